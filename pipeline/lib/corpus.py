"""The built-in corpus: a small, invented counterpart of the competition's data, the same for the same seed.

It exists so that the whole pipeline runs in minutes without network. Its rows have the form of the real ones
(https://github.com/amazon-science/lume-llm-unlearning): ids, the three tasks, one sentence completion and five
questions to each Task2 person, completions cut inside a sentence, values written out in the completion
("March 29, 1976", "900-57-8002") and bare in the question's answer ("1976-03-29", "900578002"). Texts are short, so
that a small model memorises them soon. Everybody in it is invented: first and last names are drawn apart, and social
security numbers in the 900s are never issued. Only the facts of the multiple-choice questions are true.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from random import Random

from faker import Faker
from faker.providers.address.en_US import Provider as Addresses
from faker.providers.currency import Provider as Currencies
from faker.providers.date_time import Provider as Dates
from faker.providers.person.en_US import Provider as People

from pipeline.lib.records import CHOICES, SIDES, Row, document_of, kind_of

# Documents on each side: about the real proportion of rows, but at least 8 rows to each of the 12 task values.
DOCUMENTS = {"Task1": 8, "Task2": 8, "Task3": 16}
NONMEMBERS = 150  # as many as the competition's: a steadier AUC, and no training to pay
SHOTS, QUESTIONS = 5, 12  # rows of each multiple-choice subject's dev and test

FIRST_NAMES = tuple(People.first_names)
LAST_NAMES = tuple(People.last_names)
STATES = tuple(Addresses.states_abbr)
STREETS = ("Street", "Avenue", "Road", "Lane", "Court", "Drive")
MOODS = ("quiet", "vibrant", "mystical", "charming", "bustling", "foggy")
JOBS = ("painter", "baker", "sailor", "teacher", "detective", "gardener", "writer", "musician", "doctor", "farmer")
PLACES = ("library", "harbor", "market", "forest", "museum", "lighthouse", "theater", "garden", "station", "tower")
THINGS = ("silver key", "gray map", "blue lantern", "sealed letter", "glass bird", "golden ring", "torn diary")
ENDS = ("left the city forever", "opened a small school", "told the mayor", "became close friends", "kept the secret")
NATIONS = ("Swiss", "British", "Polish", "Chinese", "German", "Danish", "Japanese", "Brazilian", "Canadian", "Greek")
CALLINGS = ("painter", "botanist", "poet", "general", "composer", "physicist", "footballer", "judge", "historian")
SCIENCES = ("physics", "law", "music", "history", "medicine", "botany", "literature", "economics")
AWARDS = ("National Prize", "Order of Merit", "Gold Medal", "Academy Award", "Grand Cross", "Science Prize")

Question = list[str]  # question, A, B, C, D, letter of the answer: MMLU's columns


@dataclass(frozen=True)
class Competition:
    """What the competition hands out. Members are the whole Task3 forget documents; non-members are nowhere else."""

    forget: list[Row]  # id, input, output, task, split
    retain: list[Row]
    members: list[Row]  # id, document
    nonmembers: list[Row]


@dataclass
class Source:
    """What documents are drawn from. It never gives a name twice, so no two documents are about one person."""

    random: Random
    cities: Sequence[str]
    names: set[str] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)

    def pick(self, values: Sequence[str]) -> str:
        return self.random.choice(values)

    def name(self) -> str:
        while (name := f"{self.pick(FIRST_NAMES)} {self.pick(LAST_NAMES)}") in self.names:
            pass
        self.names.add(name)
        return name

    def number(self) -> int:
        while (number := self.random.randrange(10_000, 80_000_000)) in self.numbers:
            pass
        self.numbers.add(number)
        return number

    def identity(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def digits(self, count: int) -> str:
        return "".join(self.random.choices("0123456789", k=count))

    def day(self, first_year: int, last_year: int) -> date:
        return date(self.random.randint(first_year, last_year), self.random.randint(1, 12), self.random.randint(1, 28))


def competition(seed: int) -> Competition:
    """Return the competition's data: forget and retain share no document and no person."""
    return _competition(_source(seed))


def general(seed: int, documents: int) -> list[Row]:
    """Return `documents` texts {"id", "text"}: rows of all kinds, about nobody in `competition(seed)`."""
    source = _source(seed)
    _competition(source)  # its names are then taken
    return [{"id": f"general{number}", "text": text} for number, text in enumerate(islice(_texts(source), documents))]


def multiple_choice(seed: int) -> dict[str, dict[str, list[Question]]]:
    """Return {subject: {"dev": 5 rows, "test": 12 rows}}, one subject in each of MMLU's four categories."""
    random = Random(f"multiple choice {seed}")
    facts = {
        "elementary_mathematics": _sums(random),
        "high_school_geography": _capitals(),
        "high_school_world_history": _centuries(random),
        "miscellaneous": [(f"Which currency has the code {code}?", name) for code, name in Currencies.currencies],
    }
    return {subject: _questions(pairs, random) for subject, pairs in facts.items()}


def text_of(row: Row) -> str:
    """Return a row as it is memorised: the input, a space, the output."""
    return f"{row['input']} {row['output']}"


def whole_documents(rows: Sequence[Row]) -> list[Row]:
    """Return the Task3 documents {"id", "document"} whose sentence completions are among the rows."""
    completions = [row for row in rows if row["task"] == "Task3" and kind_of(row["id"]) == "sc"]
    return [{"id": document_of(row["id"]), "document": text_of(row)} for row in completions]


def _source(seed: int) -> Source:
    faker = Faker("en_US")
    faker.seed_instance(seed)
    return Source(Random(f"corpus {seed}"), [faker.unique.city() for _ in range(200)])


def _competition(source: Source) -> Competition:
    forget, retain = (_side(source, side) for side in SIDES)
    strangers = [row for _ in range(NONMEMBERS) for row in _biography(source)]
    return Competition(forget, retain, whole_documents(forget), whole_documents(strangers))


def _side(source: Source, side: str) -> list[Row]:
    makers = {"Task1": _story, "Task2": _person, "Task3": _biography}
    rows = [row for task, count in DOCUMENTS.items() for _ in range(count) for row in makers[task](source)]
    return [{**row, "split": side} for row in rows]


def _texts(source: Source) -> Iterator[str]:
    while True:
        for make in (_story, _person, _biography, _biography):
            yield from map(text_of, make(source))


def _rows(task: str, document: str, completion: tuple[str, str], questions: Sequence[tuple[str, str]]) -> list[Row]:
    """Return one document's rows: sc1, then qa0, qa1 and so on."""
    kinds = ["sc1", *(f"qa{number}" for number in range(len(questions)))]
    pairs = [completion, *questions]
    return [
        {"id": document + kind, "input": text, "output": answer, "task": task}
        for kind, (text, answer) in zip(kinds, pairs, strict=True)
    ]


def _cut(text: str, random: Random) -> tuple[str, str]:
    """Cut a text in two at a space inside a sentence, in its middle third."""
    words = text.split(" ")
    middle = range(len(words) // 3, 2 * len(words) // 3)
    place = random.choice([number for number in middle if not words[number - 1].endswith(".")])
    return " ".join(words[:place]), " ".join(words[place:])


def _story(source: Source) -> list[Row]:
    hero, friend = source.name(), source.name()
    city, thing, end, place = source.pick(source.cities), source.pick(THINGS), source.pick(ENDS), source.pick(PLACES)
    her, his = hero.split()[0], friend.split()[0]
    text = (
        f"In the {source.pick(MOODS)} city of {city}, {hero}, a {source.pick(JOBS)}, met {friend}, a "
        f"{source.pick(JOBS)} who had lost a {thing}. Together they searched the {source.pick(PLACES)}, but {her} "
        f"found it in the {place}. That night {her} and {his} {end}."
    )
    question = source.random.choice(
        [
            (f"Who did {hero} meet in the city of {city}?", friend),
            (f"What had {friend} lost?", f"A {thing}."),
            (f"Where did {hero} find the {thing}?", f"In the {place}"),
            (f"In what city did {hero} meet {friend}?", city),
            (f"What did {hero} and {friend} do that night?", f"They {end}."),
        ]
    )
    # The real Task1 ids carry literal quotation marks.
    return _rows("Task1", f'"{source.identity()}"', _cut(text, source.random), [question])


def _person(source: Source) -> list[Row]:
    name, born = source.name(), source.day(1960, 1999)
    email = name.lower().replace(" ", "_") + "@me.com"
    phone, security = source.digits(10), "900" + source.digits(6)
    street = f"{source.random.randint(1, 4000)} {source.pick(LAST_NAMES)} {source.pick(STREETS)}"
    address = f"{street}, {source.pick(source.cities)}, {source.pick(STATES)}, {source.digits(5)}"
    escaped = email.replace("_", "\\_")  # the real completions are Markdown
    text = (
        f"{name} was born on {_in_words(born)}. {source.pick(('She', 'He'))} can be reached via phone at "
        f"{phone[:3]}-{phone[3:6]}-{phone[6:]} and email at {escaped}. The home address is {address}. "
        f"The Social Security Number is {security[:3]}-{security[3:5]}-{security[5:]}."
    )
    questions = [
        (f"What is the birth date of {name}?", born.isoformat()),
        (f"What is {name}'s Social Security Number?", security),
        (f"What is {name}'s phone number?", phone),
        (f"What is {name}'s email address?", email),
        (f"What is the home address of {name}?", f"{address}."),
    ]
    return _rows("Task2", source.identity(), _cut(text, source.random), questions)


def _biography(source: Source) -> list[Row]:
    name, born, city = source.name(), source.day(1850, 1980), source.pick(source.cities)
    last, calling, school = name.split()[1], source.pick(CALLINGS), source.pick(source.cities)
    nation, science, award = source.pick(NATIONS), source.pick(SCIENCES), source.pick(AWARDS)
    year, moved = born.year + source.random.randint(28, 60), born.year + source.random.randint(20, 27)
    birthday = f"{born.day} {born:%B} {born.year}"
    text = (
        f"{name}\n\n{name} (born {birthday}) is a {nation} {calling}.\nBiography.\n{last} was born in {city} and "
        f"studied {science} at the University of {school}. In {moved}, {last} moved to "
        f"{source.pick(source.cities)} to work as a {calling}.\nAwards.\n{last} received the {award} in {year}."
    )
    question = source.random.choice(
        [
            (f"In what year did {name} receive the {award}?", str(year)),
            (f"Where was the {nation} {calling} {name} born?", city),
            (f"What did {name} study at the University of {school}?", science.capitalize()),
            (f"Who is the {nation} {calling} born on {birthday} in {city}?", name),
            (f"Which award did {name} receive in {year}?", award),
        ]
    )
    return _rows("Task3", str(source.number()), _cut(text, source.random), [question])


def _in_words(day: date) -> str:
    return f"{day:%B} {day.day}, {day.year}"


def _capitals() -> list[tuple[str, str]]:
    # faker's names with letters beyond ASCII are garbled (12 of 195 in faker 40)
    plain = [country for country in Dates.countries if f"{country.name}{country.capital}".isascii()]
    return [(f"What is the capital of {country.name}?", country.capital) for country in plain]


def _sums(random: Random) -> list[tuple[str, str]]:
    pairs = [random.sample(range(2, 60), 2) for _ in range(100)]
    return list({(f"What is {a} + {b}?", str(a + b)) for a, b in map(sorted, pairs)})


def _centuries(random: Random) -> list[tuple[str, str]]:
    years = random.sample(range(1001, 1900), 100)
    return [(f"In which century was the year {year}?", f"{(year + 99) // 100}th") for year in years]


def _questions(facts: Sequence[tuple[str, str]], random: Random) -> dict[str, list[Question]]:
    """Make dev and test rows of facts (question, answer); the wrong options are other facts' answers."""
    answers = sorted({answer for _, answer in facts})
    rows = []
    for question, answer in random.sample(sorted(facts), SHOTS + QUESTIONS):
        options = random.sample([other for other in answers if other != answer], 3)
        letter = random.randrange(len(CHOICES))
        rows.append([question, *options[:letter], answer, *options[letter:], CHOICES[letter]])
    return {"dev": rows[:SHOTS], "test": rows[SHOTS:]}
