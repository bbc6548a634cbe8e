"""Which data go together: sizes, and the classes of query, gallery and pre-training.

Query and gallery may have classes that the tasks train on: the evaluation says so (closed set or open
set). That pre-trained models know them as well is refused unless it is allowed, since it flatters the
comparison.
"""

from collections.abc import Mapping

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError


def check_roles(
    tasks: Dataset,
    retrieval: Mapping[str, Dataset],
    pretrained_classes: Mapping[str, tuple[str, ...]],
) -> None:
    """Refuse pre-training on retrieval classes, and query and gallery that do not go together.

    Args:
      tasks: data of the task sequence.
      retrieval: "query" and "gallery".
      pretrained_classes: class names that each pre-trained model saw; {} where pre-training and
        retrieval may share classes.

    Raises:
      UserError: naming the shared classes, or the pictures of another size.
    """
    for role, dataset in retrieval.items():
        if dataset.images.shape[1:] != tasks.images.shape[1:]:
            raise UserError(
                f"{role} has images of {dataset.images.shape[1:]}, training of "
                f"{tasks.images.shape[1:]}: give all the same size",
                "size",
            )
        for name, classes in pretrained_classes.items():
            shared = (role, dataset.class_names)
            _refuse_shared((name, classes), shared, "pretraining_may_share")
    check_same_classes(*retrieval.values())


def check_same_classes(query: Dataset, gallery: Dataset) -> None:
    """Refuse a query and a gallery of different classes, or without labels.

    Raises:
      UserError: the class names differ, or labels are missing.
    """
    for data in (query, gallery):
        data.need_labels()
    if query.class_names != gallery.class_names:
        odd = sorted(set(query.class_names) ^ set(gallery.class_names))
        which = f" ({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''})" if odd else ", in order"
        raise UserError(f"query and gallery have different classes{which}: give both the same ones")


def _refuse_shared(one, other, unless):
    (role_a, names_a), (role_b, names_b) = one, other
    shared = sorted(set(names_a) & set(names_b))
    if shared:
        remedy = f" or set {unless}=True" if unless else ""
        raise UserError(
            f"{role_a} and {role_b} share {len(shared)} classes ({', '.join(shared[:5])}): "
            f"choose other classes for one of them{remedy}",
            unless,
        )
