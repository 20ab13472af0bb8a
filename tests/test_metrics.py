"""The measures, against brute force, formulas and the published rows."""

import csv
import itertools
import random
import statistics
from fractions import Fraction
from pathlib import Path

import pytest

from pipeline.lib import metrics

WORDS = ["a", "b", "c", "it", "of", "cat", "zz", "7"]  # of at most three letters: the stemmer leaves them alone


def longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by trying the subsequences of `first`, longest first."""
    for length in range(len(first), 0, -1):
        for picked in itertools.combinations(first, length):
            rest = iter(second)
            if all(word in rest for word in picked):
                return length
    return 0


def test_rouge_l_recall_is_the_share_of_expected_words_kept_in_order():
    draw = random.Random(0)
    several = set()
    for _ in range(400):
        expected = [draw.choice(WORDS) for _ in range(draw.randint(1, 7))]
        output = [draw.choice(WORDS) for _ in range(draw.randint(0, 9))]
        recall = longest_common(expected, output) / len(expected)
        assert metrics.rouge_l_recall(" ".join(expected), " ".join(output)) == pytest.approx(recall, abs=1e-12)
        several.add(recall)
    assert len(several) > 15  # many different values were compared, not only 0 and 1


@pytest.mark.parametrize(
    ("expected", "output", "recall"),
    [
        ("the cats were running home", "a cat run", 2 / 5),  # stemmed: cat, run
        ("one two three four", "four three two one", 1 / 4),  # order counts
        ("one two", "one two and much more", 1),  # recall: the surplus costs nothing
        ("one two and much more", "one two", 2 / 5),
        ("Born: 1990-05-12.", "born 1990/05/12", 1),  # case and punctuation do not count
        ("Zoë Müller", "zo m", 2 / 3),  # only a-z and 0-9 are letters: "zo", "m", "ller"
        ("東京 です", "東京 です", 0),  # so a text in another script has no words
        ("...", "...", 0),
        ("word", "", 0),
        ("", "word", 0),
        ("", "", 0),
        ("NA", "NA", 1),
        ("None of it", "None", 1 / 3),
        ("nan", "", 0),
    ],
)
def test_rouge_l_recall_on_awkward_texts(expected, output, recall):
    assert metrics.rouge_l_recall(expected, output) == pytest.approx(recall, abs=1e-12)


@pytest.mark.parametrize(
    ("expected", "output", "equal"),
    [
        ("1990-05-12", " 1990-05-12\n", 1),
        ("Jane Doe", "JANE DOE", 1),
        ("Jane Doe", "Jane Doe.", 0),
        ("", " \t", 1),
        ("NA", "", 0),
        ("None", "nan", 0),
        ("None", "none", 1),
        ("!?", "!?", 1),
        ("É", "é", 1),
        ("é", "e\u0301", 0),  # the same to the eye, another text
        ("ß", "SS", 0),  # lower(), not casefold()
        ("a b", "a  b", 0),
    ],
)
def test_exact_match_ignores_case_and_outer_space_alone(expected, output, equal):
    assert metrics.exact_match(expected, output) == equal


def test_harmonic_mean_is_the_formula_and_zero_if_any_is_zero():
    draw = random.Random(1)
    for _ in range(100):
        values = [draw.randint(1, 1000) / 1000 for _ in range(12)]
        exact = 12 / sum(1 / Fraction(value) for value in values)
        assert metrics.harmonic_mean(values) == pytest.approx(float(exact), rel=1e-14)
    assert metrics.harmonic_mean([1.0] * 11 + [0.0]) == 0
    assert metrics.harmonic_mean([1.0] * 12) == 1


def test_auc_is_the_share_of_pairs_in_which_the_member_has_the_lower_loss():
    draw = random.Random(2)
    for _ in range(200):
        member = [draw.randint(0, 12) / 4 for _ in range(draw.randint(1, 12))]  # a coarse grid, so that ties occur
        nonmember = [draw.randint(0, 12) / 4 for _ in range(draw.randint(1, 12))]
        pairs = [(m < n) + (m == n) / 2 for m in member for n in nonmember]
        assert metrics.auc(member, nonmember) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_of_the_two_failures():
    assert metrics.auc([0.1, 0.2], [2.0, 3.0]) == 1  # still known: under-unlearned
    assert metrics.auc([9.0, 8.0], [2.0, 3.0]) == 0  # stranger than unseen text: over-unlearned
    assert [metrics.mia_score(area) for area in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]


@pytest.mark.parametrize(("members", "nonmembers"), [(6, 9), (4, 12), (8, 8)])
def test_members_never_seen_have_a_score_below_one_by_chance(members: int, nonmembers: int):
    """Against all orders in which the losses of both can lie, each as likely."""
    scores = []
    for ranks in itertools.combinations(range(members + nonmembers), members):
        lower = sum(rank - before for before, rank in enumerate(ranks))  # pairs whose non-member has the lower loss
        scores.append(metrics.mia_score(1 - lower / (members * nonmembers)))
    mean, spread = metrics.unseen_mia_score(members, nonmembers)
    assert mean == pytest.approx(statistics.mean(scores), abs=0.004)
    assert spread == pytest.approx(statistics.pstdev(scores), abs=0.005)


@pytest.mark.parametrize("member", [[], [float("nan")], [float("inf")]])
def test_auc_refuses_what_has_no_order(member):
    with pytest.raises(ValueError):
        metrics.auc(member, [1.0])
    with pytest.raises(ValueError):
        metrics.auc([1.0], member)


def test_auc_says_that_a_side_is_empty():
    with pytest.raises(ValueError, match="^a side has no loss$"):
        metrics.auc([1.0], [])


def completion(side: str, task: str, kind: str, number: int, expected: str, output: str) -> dict:
    return {
        "id": f"{task}-{number}{kind}1",
        "task": task,
        "split": side,
        "expected_output": expected,
        "model_output": output,
    }


def test_task_values_sorts_rows_into_twelve_cells_and_terms_inverts_forget():
    cells = list(itertools.product(("forget", "retain"), ("Task1", "Task2", "Task3"), ("sc", "qa")))
    rows = []
    for hits, (side, task, kind) in enumerate(cells):  # cell number n has n right rows of 16
        # a surplus word costs a completion nothing and an answer everything, so the measures cannot be exchanged
        right, wrong = ("word more", "other") if kind == "sc" else ("Word", "word more")
        rows += [completion(side, task, kind, n, "word", right if n < hits else wrong) for n in range(16)]
    random.Random(3).shuffle(rows)
    values = metrics.task_values(metrics.cell_scores(rows))
    assert [values[side][task][kind] for side, task, kind in cells] == [hits / 16 for hits in range(12)]
    assert metrics.terms(values) == [1 - hits / 16 for hits in range(6)] + [hits / 16 for hits in range(6, 12)]


def test_task_values_names_the_cell_without_rows():
    cells = itertools.product(("forget", "retain"), ("Task1", "Task2", "Task3"), ("sc", "qa"))
    rows = [completion(*cell, 0, "word", "word") for cell in cells if cell != ("retain", "Task2", "qa")]
    with pytest.raises(ValueError, match="no qa row of Task2 on the retain side"):
        metrics.cell_scores(rows)


def test_the_final_score_of_every_published_row_is_the_mean_of_its_parts():
    """To the published digits: each number is rounded to at least three, so the two sides may differ by .001.

    Half a unit comes from the final score, and a third of half a unit from each part. Four rows (7B ZJUKLAB; 1B
    ch**3, Cyber for AI, APT) need more than the half unit of the final score alone.
    """
    with (Path(__file__).parents[1] / "data" / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 48
    beyond_half_a_unit = []
    for row in rows:
        mean = sum(Fraction(row[name]) for name in ("task_aggregate", "mia", "mmlu")) / 3
        difference = abs(mean - Fraction(row["final"]))
        assert difference <= Fraction("0.001"), row
        if difference > Fraction("0.0005"):
            beyond_half_a_unit.append((row["size"], row["team"][:4]))
    assert beyond_half_a_unit == [("7B", "ZJUK"), ("1B", "ch**"), ("1B", "Cybe"), ("1B", "APT")]


def test_an_output_that_will_match_may_always_still_match():
    """Every beginning of every text that decodes and cleans up to a match, against `exact_match` on the whole."""
    draw = random.Random(1)
    pieces = ["a", "B", "Σ", "ς", "İ", " ", "  ", ".", " .", "'s", " 's", "1", "\n", "é"]
    matched = 0
    for _ in range(3000):
        output = "".join(draw.choices(pieces, k=draw.randint(1, 6)))
        cleaned = output.replace(" .", ".").replace(" 's", "'s")
        expected = draw.choice([cleaned.upper(), cleaned.lower(), f" {cleaned}\n", cleaned.replace("a", "b")])
        if metrics.exact_match(expected, cleaned):
            matched += 1
            raw = output.encode()
            beginnings = [raw[:n].decode(errors="replace") for n in range(len(raw) + 1)]
            assert all(metrics.may_still_match(expected, beginning) for beginning in beginnings)
    assert matched > 1000


def test_an_output_past_or_beside_the_expected_text_is_lost():
    for beginning in ("Pari ", "par", " PARIS", "Paris\n", ""):
        assert metrics.may_still_match("Paris ", beginning)
    for beginning in ("Paris.", "Pb", "x", "Paris is", "ParisX"):
        assert not metrics.may_still_match("Paris ", beginning)
