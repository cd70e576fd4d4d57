from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import NO_EFFECT, DataConfig, ExperimentConfig
from raydiff.contracts import Entry
from raydiff.errors import ConfigError, DataError
from raydiff.shards import ShardSet, plan_shards, write_shards
from raydiff.shards.layout import recorded_fields


def entries(count: int, *, class_name: str = "a", split: Any = "train", size: int = 1000) -> list[Entry]:
    return [
        Entry(f"{class_name}/{split}/{number:04d}", split, class_name, "good", False, size) for number in range(count)
    ]


def by_split(plans: Any) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {"train": [], "calibration": [], "test": []}
    for plan in plans:
        ids[plan.split] += [entry.image_id for entry in plan.entries]
    return ids


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(100, 0.25, 25), (10, 0.01, 1), (7, 0.5, round(3.5)), (2, 0.25, 1), (999, 0.1, 100)],
)
def test_the_calibration_split_is_exact(count: int, fraction: float, expected: int) -> None:
    ids = by_split(plan_shards(entries(count), DataConfig(calibration_fraction=fraction)))
    assert len(ids["calibration"]) == expected
    assert len(ids["train"]) == count - expected
    assert sorted(ids["calibration"] + ids["train"]) == [entry.image_id for entry in entries(count)]


def test_every_class_has_its_share() -> None:
    plans = plan_shards(entries(40) + entries(8, class_name="b"), DataConfig())
    calibration = [entry.class_name for plan in plans if plan.split == "calibration" for entry in plan.entries]
    assert Counter(calibration) == {"a": 10, "b": 2}


def test_the_split_depends_on_ids_and_seed_alone() -> None:
    config = DataConfig()
    forwards = by_split(plan_shards(entries(60), config))
    backwards = by_split(plan_shards(entries(60)[::-1], config))
    assert forwards == backwards
    other_seed = by_split(plan_shards(entries(60), config.model_copy(update={"split_seed": 1})))
    assert set(other_seed["calibration"]) != set(forwards["calibration"])
    with_tests = by_split(plan_shards(entries(60) + entries(9, split="test"), config))
    assert with_tests["calibration"] == forwards["calibration"]


def test_the_split_is_pinned() -> None:
    assert by_split(plan_shards(entries(12), DataConfig()))["calibration"] == [
        "a/train/0003", "a/train/0000", "a/train/0005",
    ]  # fmt: skip


def test_the_test_split_keeps_its_order() -> None:
    plans = plan_shards(entries(4) + entries(9, split="test"), DataConfig())
    assert by_split(plans)["test"] == [entry.image_id for entry in entries(9, split="test")]


def test_shard_and_row_group_sizes() -> None:
    plans = [p for p in plan_shards(entries(1000, size=40_000), DataConfig(shard_mb=5)) if p.split == "train"]
    assert [plan.name for plan in plans[:2]] == ["train-00000.parquet", "train-00001.parquet"]
    for plan in plans:
        assert sum(entry.size for entry in plan.entries) <= 5 * 2**20
    assert {len(group) for plan in plans for group in plan.groups} <= {64, 750 % 64}
    large = plan_shards(entries(100, size=1_000_000), DataConfig(shard_mb=1))
    assert {len(group) for plan in large for group in plan.groups} <= {4, 3, 1}  # about 4 MB
    huge = plan_shards(entries(10, size=50_000_000), DataConfig(shard_mb=1))
    assert all(len(plan.entries) == 1 for plan in huge)


def test_row_groups_depend_neither_on_the_shards_nor_on_their_format() -> None:
    def groups(**fields: Any) -> list[tuple[Entry, ...]]:
        plans = plan_shards(entries(900, size=30_000), DataConfig(**fields))
        return [group for plan in plans for group in plan.groups]

    reference = groups()
    assert groups(shard_mb=1) == reference
    assert groups(shard_format="raw", image_size=(64, 64), channels=3, shard_mb=2) == reference


def test_plan_digests_tell_plans_apart() -> None:
    config = DataConfig()
    first, again = plan_shards(entries(60), config), plan_shards(entries(60), config)
    assert [plan.digest for plan in first] == [plan.digest for plan in again]
    digests = {plan.digest for plan in first}
    assert len(digests) == 2
    changed = [
        plan_shards([replace(entry, size=1001) for entry in entries(60)], config),
        plan_shards([replace(entry, fingerprint="rewritten") for entry in entries(60)], config),
        plan_shards(entries(60), config.model_copy(update={"shard_format": "raw"})),
        plan_shards(entries(60), config.model_copy(update={"resize": "strict"})),
        plan_shards(entries(60), DataConfig(dataset={"name": "digits", "normal": ("1",)})),
    ]
    for plans in changed:
        assert not digests & {plan.digest for plan in plans}
    added = plan_shards(entries(61), config)  # keyed by id, so one more image need not move the others
    assert added[0].digest not in digests
    resized = plan_shards(entries(60), config.model_copy(update={"image_size": (32, 32), "cache_mb": 0}))
    assert {plan.digest for plan in resized} == digests  # encoded files serve any size


def test_too_few_normals() -> None:
    with pytest.raises(
        DataError, match=r"class 'b' has 1 normal training image\(s\), of which .* \(0.25\) sets 1 aside"
    ):
        plan_shards(entries(9) + entries(1, class_name="b"), DataConfig())
    with pytest.raises(DataError, match=r"add normal images or lower the fraction"):
        plan_shards(entries(3), DataConfig(calibration_fraction=0.9))
    with pytest.raises(DataError, match=r"^the data set has no normal training image"):
        plan_shards(entries(3, split="test"), DataConfig())


def test_an_anomaly_in_the_training_split_is_refused() -> None:
    tainted = [*entries(5), replace(entries(1)[0], image_id="x", is_anomaly=True)]
    with pytest.raises(DataError, match=r"^x: is anomalous but in the training split"):
        plan_shards(tainted, DataConfig())


def test_two_images_with_one_id_are_refused() -> None:
    with pytest.raises(DataError, match=r"^a/train/0002: 1 image id\(s\) occur more than once"):
        plan_shards([*entries(5), entries(5)[2]], DataConfig())


# --- limits -----------------------------------------------------------------------------------------------------------


def labelled(counts: dict[tuple[str, str], int]) -> list[Entry]:
    return [
        Entry(f"{class_name}/{defect}/{number:03d}", "test", class_name, defect, defect != "good", 10)
        for (class_name, defect), count in counts.items()
        for number in range(count)
    ]


def chosen(found: list[Entry], split: str, **fields: Any) -> list[Entry]:
    splits = {"train": ("train", "calibration"), "test": ("test",)}[split]
    return [e for plan in plan_shards(found, DataConfig(**fields)) if plan.split in splits for e in plan.entries]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((40, 40, 40), 30, (10, 10, 10)),
        ((40, 40, 40), 31, (10, 10, 11)),
        ((40, 3, 40), 43, (20, 3, 20)),  # what the small class lacks goes to the others
        ((40, 40, 40), 6, (2, 2, 2)),
        ((5, 4, 3), 12, (5, 4, 3)),
        ((5, 4, 3), 1000, (5, 4, 3)),
    ],
)
def test_a_limit_of_training_images_is_shared_by_the_classes(
    sizes: tuple[int, ...], limit: int, expected: tuple[int, ...]
) -> None:
    found = [entry for size, name in zip(sizes, "abc", strict=True) for entry in entries(size, class_name=name)]
    kept = Counter(entry.class_name for entry in chosen(found, "train", max_train_images=limit))
    assert tuple(kept[name] for name in "abc") == expected


def test_the_limit_counts_the_calibration_images_too() -> None:
    ids = by_split(plan_shards(entries(100), DataConfig(max_train_images=40)))
    assert (len(ids["train"]), len(ids["calibration"])) == (30, 10)


def test_which_images_a_limit_keeps_depends_on_ids_and_seed_alone() -> None:
    found = [*entries(60), *entries(30, class_name="b"), *labelled({("a", "good"): 50, ("a", "dent"): 50})]
    limits = {"max_train_images": 20, "max_test_images": 20}
    plans, backwards = (plan_shards(order, DataConfig(**limits)) for order in (found, found[::-1]))
    assert {split: set(ids) for split, ids in by_split(plans).items()} == {
        split: set(ids) for split, ids in by_split(backwards).items()
    }
    for split in ("train", "test"):
        small = {entry.image_id for entry in chosen(found, split, **limits)}
        large = {entry.image_id for entry in chosen(found, split, max_train_images=30, max_test_images=30)}
        other = {entry.image_id for entry in chosen(found, split, split_seed=1, **limits)}
        assert len(small) == len(other) == 20
        assert small < large
        assert small != other


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ((100, 50, 50), 20, (10, 5, 5)),
        ((100, 50, 1), 15, (9, 5, 1)),
        ((1000, 1, 1), 10, (8, 1, 1)),  # at least one of each
        ((34, 33, 33), 10, (4, 3, 3)),
        ((5, 5, 5), 3, (1, 1, 1)),
        ((5, 5, 5), 15, (5, 5, 5)),
    ],
)
def test_a_limit_of_test_images_keeps_the_proportions(
    counts: tuple[int, ...], limit: int, expected: tuple[int, ...]
) -> None:
    kinds = [("a", "good"), ("a", "dent"), ("b", "dent")]
    found = [*entries(8), *labelled(dict(zip(kinds, counts, strict=True)))]
    kept = chosen(found, "test", max_test_images=limit)
    assert tuple(Counter((e.class_name, e.defect) for e in kept)[kind] for kind in kinds) == expected
    assert kept == [entry for entry in found if entry in kept]  # in the data set's order


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ((100, 500, 500), 100, (50, 25, 25)),
        ((30, 500, 500), 100, (30, 35, 35)),  # all normal ones there are
        ((500, 20, 10), 100, (70, 20, 10)),  # all anomalous ones there are
        ((100, 300, 100), 11, (5, 5, 1)),
        ((100, 1000, 1), 4, (2, 1, 1)),  # at least one of each
        ((5, 5, 5), 3, (1, 1, 1)),
    ],
)
def test_a_balanced_limit_keeps_half_normal(counts: tuple[int, ...], limit: int, expected: tuple[int, ...]) -> None:
    kinds = [("a", "good"), ("a", "dent"), ("b", "dent")]
    found = [*entries(8), *labelled(dict(zip(kinds, counts, strict=True)))]
    kept = chosen(found, "test", max_test_images=limit, test_balance="balanced")
    assert tuple(Counter((e.class_name, e.defect) for e in kept)[kind] for kind in kinds) == expected


def test_a_balance_is_recorded_where_it_is_set_alone(tmp_path: Path) -> None:
    plain, balanced = DataConfig(max_test_images=50), DataConfig(max_test_images=50, test_balance="balanced")
    assert "test_balance" not in recorded_fields(plain)
    shards = write_shards(balanced, str(tmp_path / "shards"))
    shards.check(balanced)
    with pytest.raises(DataError, match=r"prepared with data.test_balance = balanced, the config says proportional"):
        shards.check(plain)
    with pytest.raises(DataError, match=r"prepared with data.test_balance = proportional, the config says balanced"):
        write_shards(plain, str(tmp_path / "plain")).check(balanced)


def test_limits_that_are_too_small_are_refused() -> None:
    found = [*entries(9), *entries(9, class_name="b"), *labelled({("a", "good"): 5, ("a", "x"): 5, ("b", "y"): 5})]
    with pytest.raises(ConfigError, match=r"^data.max_train_images is 3; 2 classes need at least 4"):
        plan_shards(found, DataConfig(max_train_images=3))
    with pytest.raises(ConfigError, match=r"^data.max_test_images is 2; there are 3 kinds .* must be at least 3$"):
        plan_shards(found, DataConfig(max_test_images=2))


def test_limits_are_part_of_the_digest() -> None:
    plain = ExperimentConfig()
    digests = {plain.override({f"data.{name}": 100}).digest() for name in ("max_train_images", "max_test_images")}
    assert len(digests | {plain.digest()}) == 3


def test_shards_made_with_another_limit_are_refused_and_rewritten(tmp_path: Path) -> None:
    place = str(tmp_path / "shards")
    plain, fewer = DataConfig(), DataConfig(max_train_images=40, max_test_images=50)
    write_shards(fewer, place)
    shards = ShardSet.open(place)
    assert (shards.count("train"), shards.count("calibration"), shards.count("test")) == (30, 10, 50)
    shards.check(fewer)
    with pytest.raises(DataError, match=r"prepared with data.max_test_images = 50, the config says None"):
        shards.check(plain)
    with pytest.raises(DataError, match=r"prepared with data.max_train_images = 40, the config says 41"):
        shards.check(fewer.model_copy(update={"max_train_images": 41}))
    assert write_shards(plain, place).count("test") == 602
    with pytest.raises(DataError, match=r"prepared with data.max_test_images = None, the config says 50"):
        ShardSet.open(place).check(fewer)
    generous = plain.model_copy(update={"max_test_images": 10_000})  # keeps the same images, and says so
    write_shards(generous, place).check(generous)


def test_options_without_an_effect_are_not_recorded() -> None:
    data = DataConfig(dataset={"name": "mvtec_ad", "source": "x", "categories": "screw", "check_counts": False})
    assert type(data.dataset).model_fields["check_counts"].json_schema_extra == NO_EFFECT
    assert recorded_fields(data)["dataset"] == {"name": "mvtec_ad", "source": "x", "categories": ["screw"]}
