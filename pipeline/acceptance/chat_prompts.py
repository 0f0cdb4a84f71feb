"""Conversations that the chat probe puts to a model: our own wording, under this project's licence.

Each asks for little, so that a model which can end an answer ends this one soon. They differ in
what can go wrong with an end: facts, lists, code, other alphabets, a system prompt, several turns.
"""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What is said before the answer.

    Attributes:
        name: Names it in the report.
        messages: Keys `role` and `content`, as chat templates take them; the last is the user's.
    """

    name: str
    messages: tuple[Message, ...]


def _asked(name: str, *contents: str, system: str = "") -> Conversation:
    """User and assistant take turns; the user has the first word and the last."""
    start = [{"role": "system", "content": system}] if system else []
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]
    return Conversation(name=name, messages=(*start, *turns))


CONVERSATIONS: tuple[Conversation, ...] = (
    _asked("capital", "Which city is the capital of Portugal? Answer with its name only."),
    _asked("sum", "How much is 17 plus 25? Give just the number."),
    _asked("yes-no", "Is the Moon larger than the Earth? Say yes or no."),
    _asked("colours", "Name three colours, separated by commas."),
    _asked("greeting", "Hello!"),
    _asked(
        "brief",
        "Why does ice float on water?",
        system="You are a terse assistant. Never use more than one sentence.",
    ),
    _asked(
        "second-turn",
        "My cat is called Pixel.",
        "That is a nice name for a cat.",
        "What is my cat called?",
    ),
    _asked("code", "Write a Python function `double(x)` that returns twice x. Code only."),
    _asked("german", "Wie heißt die Hauptstadt von Österreich? Antworte mit einem Wort."),
    _asked("french", "Traduis en anglais : « Bonne nuit ». Donne seulement la traduction."),
    _asked("synonym", "Give one word that means the same as 'quick'."),
    _asked("opposite", "What is the opposite of 'hot'? One word."),
    _asked("translate", "How do you say 'thank you' in Spanish?"),
    _asked("json", 'Reply with this JSON object and nothing else: {"ok": true}'),
    _asked("spanish", "¿Cuántos días tiene una semana? Responde solo con el número."),
    _asked("japanese", "「水」は英語で何と言いますか。一語で答えてください。"),
    _asked("repeat", "Repeat this word once: harbour"),
    _asked("planet", "Which planet do we live on?"),
    _asked("rewrite", "Correct the spelling: 'I recieved you're leter.'"),
    _asked(
        "thanks",
        "How many minutes are there in two hours?",
        "There are 120 minutes in two hours.",
        "Thanks, that was all.",
    ),
    _asked("sentence", "Write one short sentence about rain."),
    _asked("list", "List two fruits, one on each line."),
    _asked("sql", "Write an SQL query that counts the rows of the table `orders`. Query only."),
    _asked(
        "role",
        "What do you do?",
        system="You are the help desk of a library. Answer in a few words.",
    ),
    _asked("emoji", "Answer with a single emoji: how is the weather on a sunny day?"),
    _asked("definition", "What is a noun? One sentence."),
    _asked("russian", "Сколько будет два плюс два? Ответь одним числом."),
    _asked("shell", "Which command lists the files of a folder on Linux? Name it only."),
    _asked("title", "Suggest a title of three words for a story about a lighthouse."),
    _asked(
        "third-turn",
        "Think of a number between one and ten.",
        "I have one.",
        "Is it greater than five?",
        "Yes, it is.",
        "Then say which number it is, and nothing more.",
    ),
)
"""Varied from the start on, so that any first part of them is a fair probe."""
