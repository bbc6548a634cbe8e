"""Rows for stores of galleries, and a plain model of a store that random histories are held against."""

import threading

import numpy as np

from compat_jax.gallery.store import Rows, Where, row_id

D = 7  # a store pads it to 8
MODELS = {number: f"{number:016x}" for number in range(10)}


def vector(key, version, size=D):
    """The feature that a version gives a picture."""
    return np.random.default_rng([row_id(key), version]).normal(size=size).astype(np.float32)


def make(keys, version, *, contents=None, payloads=None, size=D):
    keys = list(keys)
    return Rows(
        keys=keys,
        versions=np.full(len(keys), version, np.int32),
        models=[MODELS[version]] * len(keys),
        contents=contents or ["c0"] * len(keys),
        payloads=payloads or [{}] * len(keys),
        vectors=np.array([vector(k, version, size) for k in keys], np.float32).reshape(-1, size),
    )


def names(count, start=0):
    return [f"p{i}.png" for i in range(start, start + count)]


def contents_of(a_store, **options):
    """All rows as key -> (version, model, content, payload, feature), read page by page."""
    found, after = {}, -1
    while len(page := a_store.rows(after=after, limit=5, vectors=True, **options)):
        ids = page.ids
        assert (np.diff(ids) > 0).all() and ids[0] > after
        after = int(ids[-1])
        columns = (page.versions, page.models, page.contents, page.payloads, page.vectors)
        for key, *values in zip(page.keys, *columns, strict=True):
            assert key not in found
            found[key] = tuple(values)
    return found


class Model:
    """Return what a store should hold: key -> [version, content, payload, feature]."""

    def __init__(self):
        self.rows = {}

    def put(self, rows, *, replace):
        for i, key in enumerate(rows.keys):
            if replace or key not in self.rows:
                self.rows[key] = [
                    int(rows.versions[i]),
                    rows.contents[i],
                    rows.payloads[i],
                    rows.vectors[i],
                ]

    def matching(self, where):
        def equal(one, other):
            return type(one) is type(other) and one == other

        return [
            key
            for key, (version, _, payload, _) in self.rows.items()
            if where.version in (None, version)
            and (where.below is None or version < where.below)
            and (where.ids is None or row_id(key) in where.ids)
            and all(
                equal(payload.get(name), value) for name, value in (where.payload or {}).items()
            )
        ]

    def update(self, rows, where):
        chosen = set(self.matching(where))
        done = [
            i
            for i, key in enumerate(rows.keys)
            if key in chosen and self.rows[key][1] == rows.contents[i]
        ]
        for i in done:
            row = self.rows[rows.keys[i]]
            row[0], row[3] = int(rows.versions[i]), rows.vectors[i]
        return len(done)


PAYLOADS = (
    {},
    {"label": 1},
    {"label": "1"},
    {"label": True, "a.b[0]": 'it\'s \\ "quoted" % _ é\n'},
    {"label": 0, "nested": {"x": [1.5, None]}},
)
ASKED = (
    None,
    {"label": 1},
    {"label": "1"},
    {"label": True},
    {"a.b[0]": 'it\'s \\ "quoted" % _ é\n'},
    {"label": 0, "nothing": 1},
)


def random_where(rng, keys):
    pick = rng.integers(5)
    ids = np.array([row_id(k) for k in rng.choice(keys, rng.integers(0, 5))], np.int64)
    return Where(
        version=int(rng.integers(1, 4)) if pick == 1 else None,
        below=int(rng.integers(1, 5)) if pick in (2, 4) else None,
        ids=ids if pick == 3 else None,
        payload=ASKED[rng.integers(len(ASKED))],
    )


def random_rows(rng, keys):
    chosen = rng.choice(keys, rng.integers(0, 6), replace=False).tolist()
    return make(
        chosen,
        int(rng.integers(1, 4)),
        contents=[f"c{rng.integers(2)}" for _ in chosen],
        payloads=[PAYLOADS[rng.integers(len(PAYLOADS))] for _ in chosen],
    )


def step(a_store, model, rng, keys):
    """Do one random thing to both; what they return must agree."""
    rows, where = random_rows(rng, keys), random_where(rng, keys)
    new = len([k for k in rows.keys if k not in model.rows])
    match rng.integers(5):
        case 0:
            assert a_store.insert(rows) == new
            model.put(rows, replace=False)
        case 1:
            a_store.put(rows)
            model.put(rows, replace=True)
        case 2 | 3:
            assert a_store.update(rows, where) == model.update(rows, where)
        case 4:
            gone = [k for k in rows.keys[:2] if k in model.rows]
            assert a_store.delete(rows.ids[:2]) == len(gone)
            for key in gone:
                del model.rows[key]


def check_same(a_store, model, where, query):
    found = contents_of(a_store)
    assert found.keys() == model.rows.keys()
    for key, (version, content, payload, feature) in model.rows.items():
        assert found[key][:4] == (version, MODELS[version], content, payload)
        np.testing.assert_array_equal(found[key][4], feature)
    versions = [row[0] for row in model.rows.values()]
    assert dict(a_store.counts()) == {v: versions.count(v) for v in set(versions)}
    chosen = model.matching(where)
    assert set(contents_of(a_store, where=where)) == set(chosen)
    scores = {row_id(k): float(query @ model.rows[k][3]) for k in chosen}
    ids, answered = (part[0] for part in a_store.search(query[None], 3, where))
    best = sorted(scores.values(), reverse=True)[:3]
    assert (ids >= 0).sum() == len(best)
    np.testing.assert_allclose(answered[: len(best)], best, atol=1e-5)
    np.testing.assert_allclose([scores[i] for i in ids[: len(best)]], best, atol=1e-5)
    assert (answered[len(best) :] == -np.inf).all() and (ids[len(best) :] == -1).all()


def at_once(*actions):
    """Run actions in threads that start together; return what they return."""
    start, results = threading.Barrier(len(actions)), [None] * len(actions)

    def run(i):
        start.wait()
        results[i] = actions[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
