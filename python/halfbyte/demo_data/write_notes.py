"""Writes train.jsonl and heldout.jsonl, the demo's data: `python write_notes.py`.

Each row turns a casual note about an appointment into a record: `Fri 15:30 | Nadia | piano lesson`.
Training and held-out rows share no name, no activity and no sentence; days and times they share.
All words were written for this project.
"""

import json
import random
from pathlib import Path

INSTRUCTION = "Write the note as: day time | who | what"

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

TRAIN_NAMES = """
Nadia Tom Priya Lukas Greta Omar Wendy Felix Ines Hugo Marta Kofi Sven Ayşe Bruno Carla Dmitri Elena
Farid Gwen Hannah Igor Jasmin Karl Lena Mateo Nora Oscar Petra Quinn Rosa Samir Tilda Umar Vera
Walter Ximena Yusuf Zoe Alice
""".split()
HELDOUT_NAMES = """
Clara Ravi Monika Pablo Ingrid Theo Amina Victor Judith Leon Sofia Harald Keiko Brenda Anton Mei
Rupert Dalia Stefan Olga
""".split()

TRAIN_ACTIVITIES = """
piano lesson/haircut/budget meeting/tennis match/dental check/bike repair/job interview/lunch/
eye test/flat viewing/choir practice/car wash/parents evening/swimming/book club/physio/
coffee/team call/cooking class/vet visit/chess game/photo shoot/tax advice/garden work/
band rehearsal/flu shot/train trip/movie night/yoga/board meeting/guitar lesson/boat tour/
language course/blood test/picnic/driving lesson/wine tasting/birthday dinner/museum tour/
shoe fitting
""".replace("\n", "").split("/")
HELDOUT_ACTIVITIES = """
violin lesson/brunch/design review/football match/skin check/phone repair/house tour/drum practice/
pottery class/back massage/school play/dog walk/sales call/ski trip/poker game/passport photo/
theatre visit/math lesson/barbecue/dance course
""".replace("\n", "").split("/")

TRAIN_SENTENCES = [
    "{what} with {who} on {day} at {time}, please don't let me forget.",
    "Hey, {who} and I said {day} {time} for the {what}.",
    "So {who} finally answered: {what} is on {day}, {time}.",
    "I promised {who} a {what} next {day} at {time}, it will rain of course.",
    "{day} {time}, {what}, {who} will be there too.",
    "Could you write down that {who} booked the {what} for {day} at {time}?",
    "Not this week, but {day} at {time} works, so {what} with {who} it is.",
    "{who} called. The {what} moved to {day} at {time}.",
    "Remember the {what}! {who} waits for me {day} at {time}.",
    "At {time} on {day} I am meeting {who} for the {what}, bring the blue bag.",
    "My {what} is {day} around {time}, and {who} drives me there.",
    "Put {who} down for {what}, {day}, {time} sharp.",
    "Ugh, another {what}. {day} at {time}, {who} insisted.",
    "We have {what} on {day}; {who} comes by at {time}.",
    "Just so I know it later, {day} is {what} with {who}, starting {time}.",
    "{who} wants to do the {what} on {day}, let's say {time}.",
]
HELDOUT_SENTENCES = [
    "Please note: {who}, {what}, {day} at {time}.",
    "On {day} I will see {who} at {time} because of the {what}.",
    "Good news, {who} has time for the {what} on {day} at {time}!",
    "Can you save this? {day}, {time}, {what} together with {who}.",
    "I almost forgot the {what} with {who}, it is {day} at {time}.",
    "{who} asked me to come to the {what} at {time} on {day}, so keep it free.",
    "The {what} starts at {time} this {day}, {who} has the tickets.",
    "Let's do {day} at {time} then, {who} is happy about the {what}.",
]


def spoken_time(rng: random.Random) -> tuple[str, str]:
    """A time between 8 am and 8:30 pm as people write it, and the same as HH:MM."""
    hour, minute = rng.randint(8, 20), rng.choice([0, 0, 30])
    said = f"{(hour - 1) % 12 + 1}" + (":30" if minute else "") + (" am" if hour < 12 else " pm")
    return said, f"{hour:02d}:{minute:02d}"


def rows(
    names: list[str], activities: list[str], sentences: list[str], count: int, seed: int
) -> list[dict]:
    """`count` chats of a fixed instruction, a note and its record."""
    rng = random.Random(seed)
    chats = []
    for i in range(count):
        day, (said, clock) = rng.choice(DAYS), spoken_time(rng)
        who, what = names[i % len(names)], rng.choice(activities)
        note = sentences[i % len(sentences)].format(who=who, what=what, day=day, time=said)
        record = f"{day[:3]} {clock} | {who} | {what}"
        turns = {"system": INSTRUCTION, "user": note[0].upper() + note[1:], "assistant": record}
        chats.append({"messages": [{"role": r, "content": c} for r, c in turns.items()]})
    return chats


def files() -> dict[str, str]:
    """The text of each data file."""
    data = {
        "train.jsonl": rows(TRAIN_NAMES, TRAIN_ACTIVITIES, TRAIN_SENTENCES, 150, seed=1),
        "heldout.jsonl": rows(HELDOUT_NAMES, HELDOUT_ACTIVITIES, HELDOUT_SENTENCES, 40, seed=2),
    }
    return {
        name: "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
        for name, chats in data.items()
    }


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
