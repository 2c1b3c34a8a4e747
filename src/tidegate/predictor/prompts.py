"""Varied prompts for collecting answers: made from templates and word lists, no two alike.

Six kinds, chosen evenly: short questions, lists, stories, step-by-step problems, code, and conversations of
several turns. A prompt may end with a wish for a length, which moves the length of the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tidegate.predictor import word_lists as words

WISH_SHARE = 0.35
"""Share of prompts that end with a wish for a length (ours)."""

WISHES = (
    *("Answer in one sentence.", "Be brief.", "Answer with one word if you can.", "Keep it under 50 words."),
    *(
        "Explain it in detail.",
        "Write at least three paragraphs.",
        "Give plenty of examples.",
        "Be thorough.",
    ),
    *("Two sentences are enough.", "Keep it short and simple.", "Write about 200 words.", "Take your time."),
)


class Prompt(NamedTuple):
    """A conversation to be continued by the assistant, in the form of the chat protocol, and its kind."""

    kind: str
    messages: list[dict[str, str]]


_QUESTIONS = (
    "What is {topic}?",
    "Why does {topic} matter?",
    "What is the capital of {place}?",
    "Who knows most about {topic}?",
    "How would a {job} explain {topic}?",
    "What is the difference between {topic} and {topic2}?",
    "Is it a good idea for a {job} to learn about {topic}?",
    "What do people in {place} eat for breakfast?",
    "When did people first write about {topic}?",
    "What does a {job} do all day?",
    "Do a {creature} and a {creature2} have anything in common?",
    "Define {topic}.",
    "What is the best time of the year to visit {place}?",
    "Which language is spoken in {place}?",
    "Can you tell me one surprising fact about {topic}?",
    "What is {n} times {m}?",
    "How far is it from {place} to {place2}?",
    "Translate 'the {adjective} {creature}' into Spanish.",
)
_LISTS = (
    "Name {few} facts about {topic}.",
    "List {few} things to do in {place}.",
    "Give me {few} ideas for a gift for a {job}.",
    "Name {few} animals that are larger than a {creature}.",
    "Write a list of {few} pros and cons of {topic}.",
    "List {few} words that describe a {adjective} {creature}.",
    "What are the top {few} reasons to study {topic}?",
    "Suggest {few} titles for a book about a {adjective} {job}.",
    "List the tools that a {job} needs.",
    "Give me {few} tips to {activity}.",
    "Name {few} common mistakes when people {activity}.",
    "Make a table of {few} dishes from {place} with their ingredients.",
    "List {few} questions to ask a {job} in an interview.",
    "Write {few} slogans for a shop that sells {things} in {place}.",
)
_STORIES = (
    "Write a story about a {adjective} {creature} {setting}.",
    "Tell me a bedtime story about {name} and the {adjective} {creature}.",
    "Write a short poem about a {creature} {setting}.",
    "Write a letter from {name}, a {job}, to a friend in {place}.",
    "Write a dialogue between a {job} and a {adjective} {creature}.",
    "Write the first paragraph of a novel set {setting}.",
    "Invent a myth that explains why the {creature} is {adjective}.",
    "Write a diary entry of a {job} {setting}.",
    "Write a haiku about {topic}.",
    "Tell the story of how {name} lost {n} {things} {setting}.",
    "Write a long adventure of {name} the {job} and a {adjective} {creature} who travel to {place}.",
    "Write an essay about {topic} and what it means to a {job} from {place}.",
    "Write a news article about a {adjective} {creature} seen in {place}.",
)
_STEPS = (
    "{name} has {n} {things} and gives {m} of them to {name2}. How many are left? Think step by step.",
    "A {job} earns {n} dollars an hour and works {m} hours. How much is that? Show your steps.",
    "A train leaves {place} at {few} o'clock and travels at {n} km/h. How far is it after {m} hours?",
    "{name} buys {n} {things} for {m} cents each and sells half of them. "
    "Explain how to compute what is left.",
    "Solve for x: {few}x + {n} = {m}. Show each step.",
    "Explain step by step how to {activity}.",
    "Write a plan for a week to {activity}, day by day.",
    "Give step-by-step instructions for a {job} who wants to {activity}.",
    "If {n} {things} weigh {m} kilograms, what do {few} of them weigh? Explain your reasoning.",
    "What is {n} percent of {m}? Explain how you get there.",
    "Three friends, {name}, {name2} and a {job}, share {n} {things}. Work out a fair split step by step.",
    "How can {name} {activity} with only {n} dollars? Plan it step by step.",
)
_CODE = (
    "Write a function in {language} that {task}.",
    "Write a program in {language} that {task} and explain it.",
    "How do I write {language} code that {task}?",
    "Write a {language} class for a {job} with {few} attributes.",
    "Write unit tests for a {language} function that {task}.",
    "Show me the shortest {language} code that {task}.",
    "My {language} code that {task} is slow when there are {n} inputs. What can I do?",
    "Write {language} code that stores {things} of {name} and then {task}.",
    "Explain to a {job} how code that {task} works, with an example in {language}.",
    "Write a {language} table or structure for {things} with {few} fields.",
)
_OPENINGS = (
    ("Hello, I am {name}.", "Hello {name}! How can I help you today?"),
    ("I am a {job} from {place}.", "Nice to meet you! What would you like to talk about?"),
    ("Tell me something about {topic}.", "{topic} is a wide field. What would you like to know about it?"),
    ("I want to {activity}.", "That is a good idea. Have you done it before?"),
    ("What is your favourite animal?", "I like the {creature}, because it is {adjective}."),
    ("I have {n} {things}. What should I do with them?", "You could give some of them to a {job}."),
)
_FOLLOW_UPS = (
    "Thank you! And what about {topic}?",
    "No, never. Where do I start if I want to {activity}?",
    "Why is that so?",
    "Can you explain that to {name}, who is a {job}?",
    "Great. Now tell me about {place}.",
    "Thanks, bye!",
    "What would a {adjective} {creature} say to that?",
    "Yes, twice. Can you give me {few} tips?",
    "Interesting. Tell me more about it, please.",
    "OK. Now write a short poem about it.",
    "And how does a {job} in {place} see it?",
    "Can you sum that up for me?",
)
_SINGLE = {
    "question": _QUESTIONS,
    "list": _LISTS,
    "story": _STORIES,
    "steps": _STEPS,
    "code": _CODE,
}
KINDS = (*_SINGLE, "chat")


def prompts(seed: int) -> Iterator[Prompt]:
    """Yield prompts without end, the same ones for the same ``seed``, none of them twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        kind = rng.choice(KINDS)
        prompt = Prompt(kind, _chat(rng) if kind == "chat" else _turn(rng, rng.choice(_SINGLE[kind])))
        key = "\n".join(message["content"] for message in prompt.messages)
        if key not in seen:
            seen.add(key)
            yield prompt


def _turn(rng: random.Random, template: str) -> list[dict[str, str]]:
    text = template.format_map(_Filling(rng))
    if rng.random() < WISH_SHARE:
        text = f"{text} {rng.choice(WISHES)}"
    return [{"role": "user", "content": text}]


def _chat(rng: random.Random) -> list[dict[str, str]]:
    """Return a conversation of one to three answered turns and a new one."""
    filling = _Filling(rng)
    messages = []
    asked, answered = rng.choice(_OPENINGS)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        messages.append({"role": "user", "content": asked.format_map(filling)})
        messages.append({"role": "assistant", "content": answered.format_map(filling)})
        asked, answered = rng.choice(_OPENINGS[2:])
        filling = _Filling(rng)
    return messages + _turn(rng, rng.choice(_FOLLOW_UPS))


class _Filling(dict[str, str]):
    """The words of one prompt: a slot that is used twice gets the same word, ``slot2`` another draw."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        draw = rng.choice
        self._draws: dict[str, Callable[[], str]] = {
            "topic": lambda: draw(words.TOPICS),
            "place": lambda: draw(words.PLACES),
            "creature": lambda: draw(words.CREATURES),
            "job": lambda: draw(words.JOBS),
            "name": lambda: draw(words.NAMES),
            "things": lambda: draw(words.THINGS),
            "adjective": lambda: draw(words.ADJECTIVES),
            "setting": lambda: draw(words.SETTINGS),
            "task": lambda: draw(words.TASKS),
            "language": lambda: draw(words.LANGUAGES),
            "activity": lambda: draw(words.ACTIVITIES),
            "few": lambda: str(rng.randint(2, 12)),
            "n": lambda: str(rng.randint(2, 99)),
            "m": lambda: str(rng.randint(2, 99)),
        }

    def __missing__(self, slot: str) -> str:
        self[slot] = word = self._draws[slot.rstrip("2")]()
        return word
