"""One engine, one step and one sequence at a time: what the simulated instance is checked against.

Nothing here is incremental: every step counts every sequence's blocks and tokens afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.costs.forms import attention_work
from tidegate.sim import Replica
from tidegate.workloads.trace import TraceRecord


@dataclass(eq=False)
class Job:
    record: TraceRecord
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    prompt_done: bool = False
    preemptions: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def length(self) -> int:
        return self.record.input_tokens + self.generated

    @property
    def pending(self) -> int:
        return self.length - self.computed


class NaiveEngine:
    def __init__(self, replica: Replica) -> None:
        self.size = replica.instance.block_tokens
        self.total = replica.instance.kv_capacity_tokens // self.size
        self.engine, self.profile = replica.engine, replica.profile
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.preempted = False

    def serve(self, trace: Sequence[TraceRecord]) -> list[Job]:
        """Serve the whole trace on this one engine, prompts and answers; return what became of each."""
        jobs = [Job(record) for record in trace]
        coming, now = list(jobs), 0.0
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                now = max(now, coming[0].record.arrival_s)
            while coming and coming[0].record.arrival_s <= now:
                self.waiting.append(coming.pop(0))
            now = self._step(now)
        return jobs

    @property
    def free(self) -> int:
        return self.total - sum(job.blocks for job in self.running)

    def _step(self, now: float) -> float:
        self.preempted = False
        decodes: list[Job] = []
        at = 0
        while at < len(self.running):  # decodes first, then prompts, each by age; from the young end go those
            job = self.running[at]
            at += 1
            if job.prompt_done and self._room(job, 1):
                decodes.append(job)
        budget = self.engine.max_batch_tokens - len(decodes)
        chunks: list[tuple[Job, int]] = []
        at = 0
        while at < len(self.running):
            job = self.running[at]
            at += 1
            if not job.prompt_done and budget > 0:
                count = min(budget, job.pending)
                if self._room(job, count):
                    chunks.append((job, count))
                    budget -= count
                running_decodes = [other for other in decodes if other in self.running]
                budget += len(decodes) - len(running_decodes)
                decodes = running_decodes
        decodes = [job for job in decodes if job in self.running]
        while budget > 0 and self.waiting and len(self.running) < self.engine.max_num_seqs:
            job = self.waiting[0]
            reserve = int(self.engine.reserve * self.total) if self.running else 0
            if self.preempted or self.free - self._blocks(job.length) < reserve:
                break
            self.running.append(self.waiting.pop(0))
            count = min(budget, job.pending)
            assert self._room(job, count)
            chunks.append((job, count))
            budget -= count
        assert self.free >= 0
        now += self.engine.host_s + self._seconds(decodes, chunks)
        for job, count in [*((job, 1) for job in decodes), *chunks]:
            job.computed += count
            if job.pending == 0:
                self._token(job, now)
        return now

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _room(self, job: Job, count: int) -> bool:
        """Have blocks for the job's next tokens, preempting from the young end; False if that is the job."""
        need = self._blocks(job.computed + count)
        while need - job.blocks > self.free:
            youngest = self.running.pop()
            youngest.computed, youngest.blocks, youngest.prompt_done = 0, 0, False
            youngest.preemptions += 1
            self.preempted = True
            self.waiting.insert(0, youngest)
            if youngest is job:
                return False
        job.blocks = need
        return True

    def _seconds(self, decodes: list[Job], chunks: list[tuple[Job, int]]) -> float:
        context = sum(job.length for job in decodes)
        tokens = sum(count for _, count in chunks)
        attention = sum(attention_work(count, job.computed) for job, count in chunks)
        if not chunks:
            return float(self.profile.step.seconds(len(decodes), context))
        if not decodes:
            return float(self.profile.prefill.seconds(tokens, attention))
        return float(self.profile.mixed.seconds(tokens + len(decodes), attention, context))

    def _token(self, job: Job, now: float) -> None:
        job.prompt_done = True
        job.generated += 1
        job.last_s = now
        if job.generated == 1:
            job.first_s = now
        if job.generated == job.record.output_tokens:
            self.running.remove(job)
            job.blocks = 0
