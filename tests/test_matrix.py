"""The text and the pictures of an evaluation: its table, its sentence, its files."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from compat_jax import report
from compat_jax.errors import UserError
from compat_jax.matrix import Evaluation, Evaluations, across_replacements


def noisy(**changes):
    """Two versions; the newer one loses a single one of 40 queries, or most of them."""
    old, new = np.repeat([1.0, 0.0], 20), np.repeat([1.0, 0.0], 20)
    new[0] = 0
    scores = {(0, 0): old, (1, 0): new, (1, 1): np.ones(40)}
    matrix = np.array([[old.mean(), 0], [new.mean(), 1]])
    return Evaluation("recall@1", matrix, ("0", "1"), (False, False), scores=scores, **changes)


def test_the_table_marks_what_is_within_noise():
    result = noisy(notes=("A note.",))
    assert result.within_noise.tolist() == [[False, False], [True, False]]
    assert result.table("hoc").splitlines() == [
        "d-Simplex-HOC: recall@1 %, rows = query version, columns = gallery version "
        "(* model replaced, x not compatible, ~ within noise)",
        "             0       1",
        "   0    50.00 ",
        "   1    47.50~ 100.00 ",
        "AC 0.00   AA 65.83   (95 %: AC 0.00 to 0.00, AA 55.81 to 76.67; 1 of 1 pairs within noise)",
        "A note.",
    ]
    assert "In 1 the difference is within noise, either way." in result.meaning()
    alone = Evaluation("map", np.array([[0.5]]), ("0",), (False,), scores={(0, 0): np.eye(2)[0]})
    assert alone.table().splitlines()[-1] == "AC -   AA 50.00   (95 %: AA 0.00 to 100.00)"
    assert alone.summary()["intervals"]["within_noise"] == []


def test_a_pair_beyond_noise_keeps_its_mark():
    result = noisy()
    result.scores[1, 0] = result.scores[0, 0] * (np.arange(40) < 5)
    result.matrix[1, 0] = 5 / 40
    assert not result.within_noise.any()
    assert "12.50x" in result.table() and "~" not in result.table()
    assert "0 of 1 pairs within noise" in result.table()
    assert "noise" not in result.meaning()


def test_flips_by_class_need_scores_and_labels():
    with pytest.raises(UserError, match="evaluate the chain"):
        RESULT.flips_by_class()
    with pytest.raises(UserError, match="evaluate the chain"):
        noisy().flips_by_class()
    labelled = noisy(labels=np.repeat([0, 1], 20), class_names=("a", "b", "none"))
    negative = labelled.flips_by_class().negative[1, 0]
    np.testing.assert_allclose(negative, [1 / 20, 0, np.nan])
    assert RESULT.flips is None and RESULT.summary()["flips"] is None
    assert RESULT.intervals is None and RESULT.summary()["intervals"] is None


# The report

RESULT = Evaluation(
    "identification",
    np.array([[0.5, 0, 0, 0], [0.55, 0.6, 0, 0], [0.5, 0.61, 0.7, 0], [0.1, 0.0, 0.123, 0.8]]),
    ("0", "1", "2", "3"),
    (False, False, False, True),
    ((3, 1),),
)
FINE = Evaluation("map", np.array([[0.4, 0], [0.45, 0.5]]), ("0", "1"), (False, False))
TABLE = (
    "d-Simplex-HOC: identification %, rows = query version, columns = gallery version "
    "(* model replaced, x not compatible)\n"
    "             0       1       2       3\n"
    "   0    50.00 \n"
    "   1    55.00   60.00 \n"
    "   2    50.00x  61.00   70.00 \n"
    "   3*   10.00x   0.00x  12.30x  80.00 \n"
    "AC 0.33   AA 44.83\n"
)


def test_the_table_marks_replacements_and_incompatible_pairs():
    assert report.table({"hoc": RESULT, "mine": FINE}) == TABLE + (
        "\n"
        "mine: map %, rows = query version, columns = gallery version "
        "(* model replaced, x not compatible)\n"
        "             0       1\n"
        "   0    40.00 \n"
        "   1    45.00   50.00 \n"
        "AC 1.00   AA 45.00"
    )


def test_a_result_prints_its_matrix_what_it_means_and_what_a_replacement_did():
    result = dataclasses.replace(RESULT, method="hoc", notes=("3 of 4 are noted.",))
    assert str(result) == TABLE + (
        "3 of 4 are noted.\n"
        "AC: in 2 of 6 pairs, queries of the newer version do better on the older version's gallery "
        "than the older version itself. AA: mean of all cells.\n"
        "d-Simplex-HOC: after a replacement, queries of the new model find 7 % in galleries that "
        "older models embedded (the new models' own galleries: 80 %)."
    )
    assert str(FINE).splitlines()[0].startswith("map %, rows = query version")
    assert "after a replacement" not in str(FINE)
    both = Evaluations([result, FINE])
    assert str(both) == f"{result}\n\n{FINE}"


def test_one_version_alone_has_no_compatibility():
    alone = Evaluation("map", np.array([[0.4]]), ("0",), (False,))
    assert report.table({"er": alone}).splitlines()[-1] == "AC -   AA 40.00"
    assert alone.summary()["backward_compatibility"] is None
    assert str(alone).endswith("One version alone has no older gallery to be compatible with.")


def test_the_sentence_says_what_a_replacement_does_to_old_galleries():
    # Across the replacement: 10, 0 and 12.3 %; the replaced model on its own gallery: 80 %.
    assert report.sentence({"er": RESULT}) == (
        "ER (learnable classifier): after a replacement, queries of the new model find 7 % in "
        "galleries that older models embedded (the new models' own galleries: 80 %)."
    )
    assert report.sentence({"hoc": FINE}) == ""
    np.testing.assert_allclose(
        across_replacements(RESULT.matrix, RESULT.replaced), [0.1, 0.0, 0.123]
    )


def test_files_are_written_and_written_again(tmp_path):
    for _ in range(2):
        paths = report.write({"hoc": RESULT, "er": FINE}, tmp_path / "out")
    names = ["matrix.json", "matrices.png", "average_accuracy.png"]
    assert [p.name for p in paths] == names == [p.name for p in paths if p.exists()]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    content = json.loads(paths[0].read_text())
    assert content["hoc"]["matrix"] == RESULT.matrix.tolist()
    assert content["hoc"]["average_compatibility"] == pytest.approx(2 / 6)
    assert content["hoc"]["average_accuracy_per_step"] == pytest.approx(
        [0.5, 0.55, 3.46 / 6, 4.483 / 10]
    )
    assert content["er"]["backward_compatibility"] == pytest.approx(0.05)
    assert content["er"]["forward_compatibility"] == pytest.approx(-0.05)
    for path in paths[1:]:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.format == "PNG"
            assert 300 < image.width < 3000 and 300 < image.height < 3000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not a blank page


def test_a_long_sequence_is_drawn_too():
    matrix = np.tril(np.full((31, 31), 0.5))
    long = Evaluation("map", matrix, tuple(map(str, range(31))), (False,) * 31)
    width, height = report.heat_maps({"hoc": long, "er": long}).get_size_inches()
    assert width < 30 and height < 15
    assert report.table({"hoc": long}).count("x") == 2 + 31 * 30 // 2  # ties; 2 in the title
