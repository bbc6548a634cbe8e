"""The matrix of a chain against every pair computed by hand; the table, the sentence, the pictures."""

import io
import json

import numpy as np
import pytest
import tiny
from PIL import Image

from compat_jax import evaluation, report
from compat_jax.chain import Chain
from compat_jax.errors import Stopped, UserError
from compat_jax.evaluation import METRICS, Evaluation, evaluate
from compat_jax.retrieval import extract, identification, mean_average_precision, recall_at_k

QUERY = tiny.dataset(classes=4, per_class=9, seed=1, name="retrieval")
GALLERY = tiny.dataset(classes=4, per_class=5, seed=2, name="retrieval")


@pytest.fixture(scope="module", autouse=True)
def backbone():
    with tiny.one_conv():
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Three versions of one feature size and two widths; the last but one replaced another."""
    made = Chain(tmp_path_factory.mktemp("evaluation") / "chain")
    for task, width in enumerate((8, 16, 8)):
        record = tiny.record(
            task=task,
            backbone_arguments={"width": width},
            replaced_by="pre-trained version 0" if task == 1 else None,
        )
        made.add(tiny.variables(record, seed=task), record)
    return made


@pytest.fixture
def extractions(monkeypatch):
    """Numbers of the versions that embedded something, one for each time."""
    seen = []

    def counting(version, *arguments):
        seen.append(version.number)
        return extract(version, *arguments)

    monkeypatch.setattr(evaluation, "extract", counting)
    return seen


def by_hand(chain, score):
    """Every pair of versions on its own."""
    matrix = np.zeros((len(chain), len(chain)))
    for t in chain.numbers():
        for k in range(t + 1):
            features = (
                extract(chain.open(t), QUERY.images),
                QUERY.labels,
                extract(chain.open(k), GALLERY.images),
                GALLERY.labels,
            )
            matrix[t, k] = score(*features)
    return matrix


SCORES = {
    "identification": identification,
    "recall@1": lambda *four: recall_at_k(*four, ks=(1,))[1],
    "map": lambda *four: mean_average_precision(*four).value,
}


@pytest.mark.parametrize("metric", SCORES)
def test_the_matrix_is_what_each_pair_gives_by_itself(chain, metric):
    result = evaluate(chain, QUERY, GALLERY, metric)
    expected = by_hand(chain, SCORES[metric])
    np.testing.assert_allclose(result.matrix, expected, atol=1e-6)
    assert np.ptp(expected[np.tril_indices(3)]) > 0.05  # the pairs do differ
    assert result.metric == metric and result.incomparable == ()
    assert result.tasks == ("0", "1", "2") and result.replaced == (False, True, False)


def test_every_metric_has_an_oracle_here():
    assert set(METRICS) == set(SCORES)


def test_each_version_embeds_twice(chain, extractions):
    evaluate(chain, QUERY, GALLERY)
    assert extractions == [0, 0, 1, 1, 2, 2]


def test_what_is_cached_is_not_computed_again(chain, extractions, tmp_path):
    first = evaluate(chain, QUERY, GALLERY, cache=tmp_path)
    assert len(extractions) == 6
    again = evaluate(chain, QUERY, GALLERY, cache=tmp_path)
    assert len(extractions) == 6
    np.testing.assert_array_equal(first.matrix, again.matrix)
    np.testing.assert_array_equal(first.matrix, evaluate(chain, QUERY, GALLERY).matrix)


def test_a_stopped_evaluation_goes_on_where_it_was(chain, extractions, tmp_path):
    with pytest.raises(Stopped):
        evaluate(chain, QUERY, GALLERY, cache=tmp_path, should_stop=lambda: len(extractions) >= 4)
    assert extractions == [0, 0, 1, 1]
    result = evaluate(chain, QUERY, GALLERY, cache=tmp_path)
    assert extractions == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(result.matrix, evaluate(chain, QUERY, GALLERY).matrix)


def test_a_killed_evaluation_goes_on_where_it_was(chain, monkeypatch, tmp_path):
    whole = evaluate(chain, QUERY, GALLERY)
    for moment in (1, 3, 4):
        calls = []

        def killed(*arguments, moment=moment, calls=calls):
            if len(calls) == moment:
                raise KeyboardInterrupt
            calls.append(arguments)
            return extract(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluation, "extract", killed)
            evaluate(chain, QUERY, GALLERY, cache=tmp_path / str(moment))
        result = evaluate(chain, QUERY, GALLERY, cache=tmp_path / str(moment))
        np.testing.assert_array_equal(result.matrix, whole.matrix)


def test_the_cache_knows_what_its_numbers_were_made_of(chain, extractions, tmp_path):
    part = evaluate(chain, QUERY, GALLERY, numbers=[0, 2], cache=tmp_path)
    whole = evaluate(chain, QUERY, GALLERY, cache=tmp_path)
    np.testing.assert_array_equal(part.matrix, whole.matrix[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(whole.matrix, evaluate(chain, QUERY, GALLERY).matrix)
    for other in (
        {"metric": "map"},
        {"dtype": "bfloat16"},
        {"query": tiny.dataset(classes=4, per_class=9, seed=3, name="retrieval")},
    ):
        before = len(extractions)
        arguments = {"query": QUERY, "gallery": GALLERY, "cache": tmp_path, **other}
        evaluate(chain, numbers=[0], **arguments)
        assert len(extractions) == before + 2


def test_features_of_other_sizes_count_as_nothing_and_are_listed(tmp_path):
    chain = Chain(tmp_path / "chain")
    for task, width in enumerate((8, 16, 8)):
        record = tiny.record(
            method="er",
            task=task,
            head_classes=2 + task,
            feature_size=width,
            backbone_arguments={"width": width},
        )
        chain.add(tiny.variables(record, seed=task), record)
    result = evaluate(chain, QUERY, GALLERY, cache=tmp_path / "cache")
    assert result.incomparable == ((1, 0), (2, 1))
    assert result.matrix[1, 0] == 0 and result.matrix[2, 1] == 0
    assert (result.matrix[[0, 1, 2, 2], [0, 1, 2, 0]] > 0).all()
    again = evaluate(chain, QUERY, GALLERY, cache=tmp_path / "cache")
    assert again.incomparable == result.incomparable
    assert json.loads(json.dumps(result.summary()))["incomparable"] == [[1, 0], [2, 1]]


def test_the_versions_of_a_chain_may_be_chosen(chain):
    whole = evaluate(chain, QUERY, GALLERY).matrix
    last = evaluate(chain, QUERY, GALLERY, numbers=[2])
    np.testing.assert_array_equal(last.matrix, whole[2:, 2:])
    assert last.summary()["backward_compatibility"] is None
    assert last.summary()["average_accuracy"] == pytest.approx(whole[2, 2])


def test_mistakes_are_told_before_anything_is_embedded(chain, extractions):
    with pytest.raises(UserError, match=r"unknown metric 'recall@2'\. Did you mean 'recall@1'\?"):
        evaluate(chain, QUERY, GALLERY, "recall@2")
    with pytest.raises(UserError, match="query and gallery have different classes"):
        evaluate(chain, QUERY, tiny.dataset(classes=4, name="other"))
    with pytest.raises(UserError, match=r"version 0 embeds uint8 images of shape \(8, 8, 3\)"):
        large = tiny.dataset(classes=4, size=16, name="retrieval")
        evaluate(chain, large, large)
    with pytest.raises(UserError, match="no version 5"):
        evaluate(chain, QUERY, GALLERY, numbers=[5])


# The report

RESULT = Evaluation(
    "identification",
    np.array([[0.5, 0, 0, 0], [0.55, 0.6, 0, 0], [0.5, 0.61, 0.7, 0], [0.1, 0.0, 0.123, 0.8]]),
    ("0", "1", "2", "3"),
    (False, False, False, True),
    ((3, 1),),
)
FINE = Evaluation("map", np.array([[0.4, 0], [0.45, 0.5]]), ("0", "1"), (False, False))


def test_the_table_marks_replacements_and_incompatible_pairs():
    assert report.table({"hoc": RESULT, "mine": FINE}) == (
        "d-Simplex-HOC: identification %, rows = query version, columns = gallery version "
        "(* model replaced, x not compatible)\n"
        "             0       1       2       3\n"
        "   0    50.00 \n"
        "   1    55.00   60.00 \n"
        "   2    50.00x  61.00   70.00 \n"
        "   3*   10.00x   0.00x  12.30x  80.00 \n"
        "AC 0.33   AA 44.83\n"
        "\n"
        "mine: map %, rows = query version, columns = gallery version "
        "(* model replaced, x not compatible)\n"
        "             0       1\n"
        "   0    40.00 \n"
        "   1    45.00   50.00 \n"
        "AC 1.00   AA 45.00"
    )


def test_one_version_alone_has_no_compatibility():
    alone = Evaluation("map", np.array([[0.4]]), ("0",), (False,))
    assert report.table({"er": alone}).splitlines()[-1] == "AC -   AA 40.00"
    assert alone.summary()["backward_compatibility"] is None


def test_the_sentence_says_what_a_replacement_does_to_old_galleries():
    # Across the replacement: 10, 0 and 12.3 %; the replaced model on its own gallery: 80 %.
    assert report.sentence({"er": RESULT}) == (
        "ER (learnable classifier): after a replacement, queries of the new model find 7 % in "
        "galleries that older models embedded (the new models' own galleries: 80 %)."
    )
    assert report.sentence({"hoc": FINE}) == ""
    np.testing.assert_allclose(
        report.across_replacements(RESULT.matrix, RESULT.replaced), [0.1, 0.0, 0.123]
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
