"""A fleet for tests: members that a test takes up and down."""

from __future__ import annotations

from tidegate.core.errors import FleetFull
from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile
from tidegate.fleet.member import Capabilities, FleetListener, Member


class GivenFleet:
    """A ``Fleet`` of given URLs, all up from the start."""

    def __init__(
        self,
        urls: dict[str, str],
        profile: Profile | None = None,
        model: str = "fake",
        context: int = 1 << 20,
    ) -> None:
        self.urls = urls
        self.suspected: list[str] = []
        self.listener: FleetListener | None = None
        self._profile = profile
        self._model = model
        self._context = context
        self.capabilities = Capabilities()
        self.fixed: dict[str, Role] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.urls)

    def starting(self) -> dict[str, str]:
        return {}

    async def start(self, listener: FleetListener) -> None:
        self.listener = listener
        for name in self.urls:
            self.up(name)

    def up(self, name: str, url: str = "") -> None:
        """Report an instance up, under a new URL if given."""
        self.urls[name] = url or self.urls[name]
        role = self.fixed.get(name)
        member = Member(
            Instance(name, 1 << 30, self._context, flippable=role is None),
            self.urls[name],
            self._model,
            engine_id=name,
            profile=self._profile,
            secret="s3",
            capabilities=self.capabilities,
            fixed_role=role,
        )
        assert self.listener is not None
        self.listener.member_up(member)

    def down(self, name: str) -> None:
        """Report an instance down."""
        assert self.listener is not None
        self.listener.member_down(name, "taken down")

    def suspect(self, instance_id: str) -> None:
        self.suspected.append(instance_id)

    def add(self) -> str:
        raise FleetFull("a fleet of given URLs cannot grow")

    def remove(self, instance_id: str, reason: str) -> bool:
        self.down(instance_id)
        return True

    async def stop(self) -> None: ...
