"""Conversations that the chat probe puts to a model: our own wording, under this project's licence.

Each asks for little, so that a model which can end an answer ends this one soon. They differ in
what can go wrong with an end: facts, lists, code, other alphabets, a system prompt, several turns.
"""

from __future__ import annotations

import itertools

Message = dict[str, str]
"""Keys `role` and `content`, as chat templates take them; the last is the user's."""


def _asked(*contents: str, system: str = "") -> tuple[Message, ...]:
    """User and assistant take turns; the user has the first word and the last."""
    start = [{"role": "system", "content": system}] if system else []
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": next(roles), "content": content} for content in contents]
    return (*start, *turns)


CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "capital": _asked("Which city is the capital of Portugal? Answer with its name only."),
    "sum": _asked("How much is 17 plus 25? Give just the number."),
    "yes-no": _asked("Is the Moon larger than the Earth? Say yes or no."),
    "colours": _asked("Name three colours, separated by commas."),
    "greeting": _asked("Hello!"),
    "brief": _asked(
        "Why does ice float on water?",
        system="You are a terse assistant. Never use more than one sentence.",
    ),
    "second-turn": _asked(
        "My cat is called Pixel.",
        "That is a nice name for a cat.",
        "What is my cat called?",
    ),
    "code": _asked("Write a Python function `double(x)` that returns twice x. Code only."),
    "german": _asked("Wie heißt die Hauptstadt von Österreich? Antworte mit einem Wort."),
    "french": _asked("Traduis en anglais : « Bonne nuit ». Donne seulement la traduction."),
    "synonym": _asked("Give one word that means the same as 'quick'."),
    "opposite": _asked("What is the opposite of 'hot'? One word."),
    "translate": _asked("How do you say 'thank you' in Spanish?"),
    "json": _asked('Reply with this JSON object and nothing else: {"ok": true}'),
    "spanish": _asked("¿Cuántos días tiene una semana? Responde solo con el número."),
    "japanese": _asked("「水」は英語で何と言いますか。一語で答えてください。"),
    "repeat": _asked("Repeat this word once: harbour"),
    "planet": _asked("Which planet do we live on?"),
    "rewrite": _asked("Correct the spelling: 'I recieved you're leter.'"),
    "thanks": _asked(
        "How many minutes are there in two hours?",
        "There are 120 minutes in two hours.",
        "Thanks, that was all.",
    ),
    "sentence": _asked("Write one short sentence about rain."),
    "list": _asked("List two fruits, one on each line."),
    "sql": _asked("Write an SQL query that counts the rows of the table `orders`. Query only."),
    "role": _asked(
        "What do you do?",
        system="You are the help desk of a library. Answer in a few words.",
    ),
    "emoji": _asked("Answer with a single emoji: how is the weather on a sunny day?"),
    "definition": _asked("What is a noun? One sentence."),
    "russian": _asked("Сколько будет два плюс два? Ответь одним числом."),
    "shell": _asked("Which command lists the files of a folder on Linux? Name it only."),
    "title": _asked("Suggest a title of three words for a story about a lighthouse."),
    "third-turn": _asked(
        "Think of a number between one and ten.",
        "I have one.",
        "Is it greater than five?",
        "Yes, it is.",
        "Then say which number it is, and nothing more.",
    ),
}
"""Name in the report -> what comes before the answer. Varied from the start on, so that any first
part of them is a fair probe."""
