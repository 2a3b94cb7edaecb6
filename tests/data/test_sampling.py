import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmamba.data import BalancedSampler, EpochSampler, SampleGroups, SampleKey, sampler_for

LENGTHS, SEEDS, EPOCHS, WORLDS = (
    st.integers(1, 50),
    st.integers(0, 2**40),
    st.integers(0, 300),
    st.integers(1, 5),
)


@given(LENGTHS, SEEDS, EPOCHS)
def test_every_sample_once_an_epoch(length: int, seed: int, epoch: int) -> None:
    sampler = EpochSampler(length, seed=seed)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert sorted(key.index for key in keys) == list(range(length))
    assert {key.epoch for key in keys} == {epoch}
    assert len(sampler) == length


@given(LENGTHS, SEEDS, EPOCHS, st.data())
def test_going_on_is_the_same_order(length: int, seed: int, epoch: int, data: st.DataObject) -> None:
    whole = EpochSampler(length, seed=seed)
    whole.set_epoch(epoch)
    consumed = data.draw(st.integers(0, length))
    rest = EpochSampler(length, seed=seed)
    rest.done = (epoch, consumed)
    rest.set_epoch(epoch)
    assert list(rest) == list(whole)[consumed:]
    for sampler in (whole, rest):
        sampler.set_epoch(epoch + 1)
    assert list(rest) == list(whole)


@given(LENGTHS, WORLDS, SEEDS, st.booleans(), st.integers(1, 4), st.integers(0, 3))
def test_ranks_partition_the_samples(
    length: int, world_size: int, seed: int, shuffle: bool, chunk: int, rounds: int
) -> None:
    step = max(1, rounds * chunk * world_size)

    def rank(number: int) -> EpochSampler:
        return EpochSampler(
            length, seed=seed, shuffle=shuffle, rank=number, world_size=world_size, chunk=chunk, step=step
        )

    one = list(EpochSampler(length, seed=seed, shuffle=shuffle))
    ranks = [list(rank(number)) for number in range(world_size)]
    assert [len(rank(number)) for number in range(world_size)] == [len(keys) for keys in ranks]
    turns = range(0, max(map(len, ranks)), chunk)
    dealt = [key for turn in turns for keys in ranks for key in keys[turn : turn + chunk]]
    assert dealt == one[: length - length % step]
    if rounds:
        assert len({len(keys) for keys in ranks}) == 1


@given(LENGTHS, SEEDS, EPOCHS, st.integers(1, 3), st.data())
def test_pairs_are_alike(length: int, seed: int, epoch: int, kinds: int, data: st.DataObject) -> None:
    alike = data.draw(st.lists(st.integers(0, kinds - 1), min_size=length, max_size=length))
    sampler = EpochSampler(length, seed=seed, alike=alike)
    sampler.set_epoch(epoch)
    order = [key.index for key in sampler]
    assert sorted(order) == list(range(length))
    single = sum(alike.count(kind) % 2 for kind in range(kinds))
    paired = [alike[index] for index in order[: length - single]]
    assert paired[::2] == paired[1::2]
    unshuffled = EpochSampler(length, shuffle=False, alike=alike)
    assert [key.index for key in unshuffled] == list(range(length))


GROUPS, WINDOWS = st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5)


@given(GROUPS, WINDOWS, SEEDS, EPOCHS, WORLDS, st.data())
def test_grouped_samples_are_read_together(
    groups: list[int], window: int, seed: int, epoch: int, world_size: int, data: st.DataObject
) -> None:
    """Every sample once, no window before the last is done; ranks and a resume leave the order as it is."""

    def sampler(**kwargs: int) -> EpochSampler:
        made = EpochSampler(sum(groups), seed=seed, groups=SampleGroups(groups, window), **kwargs)
        made.set_epoch(epoch)
        return made

    whole = [key.index for key in sampler()]
    assert sorted(whole) == list(range(sum(groups)))
    of = [group for group, size in enumerate(groups) for _ in range(size)]
    seen = list(dict.fromkeys(of[index] for index in whole))
    lasts = {group: max(i for i, index in enumerate(whole) if of[index] == group) for group in seen}
    for place, index in enumerate(whole):
        assert sum(lasts[group] >= place for group in seen[: seen.index(of[index]) + 1]) <= window
    ranks = [[key.index for key in sampler(rank=rank, world_size=world_size)] for rank in range(world_size)]
    assert [ranks[i % world_size][i // world_size] for i in range(len(whole))] == whole
    rest = sampler()
    consumed = data.draw(st.integers(0, len(whole)))
    rest.done = (epoch, consumed)
    assert [key.index for key in rest] == whole[consumed:]


def test_groups_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="add up to 20, got 9"):
        EpochSampler(20, groups=SampleGroups([4, 5], 2))


def test_the_order_within_a_window_is_drawn_for_each_epoch() -> None:
    sampler = EpochSampler(200, groups=SampleGroups([10] * 20, 4))
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append([key.index for key in sampler])
    assert orders[0] != orders[1]
    assert len({index // 10 for index in orders[0][:40]}) == 4
    assert len({index // 10 for index in orders[0][:8]}) > 1


def test_a_step_that_the_ranks_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"multiple of chunk \* world_size, 6, got 8"):
        EpochSampler(20, world_size=2, chunk=3, step=8)


def test_order_depends_on_seed_and_epoch() -> None:
    orders = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = EpochSampler(30, seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(key.index for key in sampler))
    assert len(orders) == 4


@pytest.mark.parametrize("epoch", [0, 3])
def test_without_shuffle_the_order_is_that_of_the_data(epoch: int) -> None:
    sampler = EpochSampler(4, shuffle=False)
    sampler.set_epoch(epoch)
    assert list(sampler) == [SampleKey(epoch, index) for index in range(4)]


def balanced(classes: list[int], epoch: int = 0, **kwargs: int) -> EpochSampler:
    sampler = BalancedSampler(classes, **kwargs)
    sampler.set_epoch(epoch)
    return sampler


CLASSES = st.lists(st.sampled_from([0, 1, 1, 1, 2, 2, 2, 2, 5]), min_size=1, max_size=60)


@given(CLASSES, SEEDS, EPOCHS)
def test_every_class_is_drawn_equally_often(classes: list[int], seed: int, epoch: int) -> None:
    keys = list(balanced(classes, epoch, seed=seed))
    assert len(keys) == len(classes)
    assert len(set(keys)) == len(keys)  # a sample that is drawn again is augmented in another way
    counts = [sum(classes[key.index] == label for key in keys) for label in set(classes)]
    assert max(counts) - min(counts) <= 1
    for label in set(classes):
        times = [
            sum(key.index == index for key in keys)
            for index in range(len(classes))
            if classes[index] == label
        ]
        assert max(times) - min(times) <= 2


def test_all_samples_of_a_large_class_are_drawn_in_turn() -> None:
    classes = [0] * 30 + [1] * 10
    drawn: list[int] = []
    for epoch in range(3):  # 20 of a class each
        drawn += [key.index for key in balanced(classes, epoch) if key.index < 30]
    assert sorted(drawn) == sorted([*range(30), *range(30)])


@given(CLASSES, WORLDS, SEEDS, EPOCHS, st.data())
def test_ranks_and_a_resume_leave_the_balanced_order_as_it_is(
    classes: list[int], world_size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    whole = list(balanced(classes, epoch, seed=seed))
    ranks = [
        list(balanced(classes, epoch, seed=seed, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [ranks[i % world_size][i // world_size] for i in range(len(whole))] == whole
    rest = balanced(classes, epoch, seed=seed)
    consumed = data.draw(st.integers(0, len(classes)))
    rest.done = (epoch, consumed)
    assert list(rest) == whole[consumed:]


class Data(list[int]):
    """A dataset that may say how its samples should be drawn."""

    balance: list[int] | None = None
    groups: SampleGroups | None = None


def test_a_dataset_says_how_it_is_sampled() -> None:
    data = Data([0] * 6)
    assert list(sampler_for(data, False, seed=1)) == [SampleKey(0, index) for index in range(6)]
    assert list(sampler_for(data, True, seed=1)) == list(EpochSampler(6, seed=1))
    data.groups = SampleGroups([3, 3], 1)
    assert list(sampler_for(data, True)) == list(EpochSampler(6, groups=data.groups))
    data.balance = [0, 0, 0, 0, 0, 1]
    assert list(sampler_for(data, True, step=4, rank=1, world_size=2)) == list(
        BalancedSampler(data.balance, step=4, rank=1, world_size=2)
    )
    assert list(sampler_for(data, False)) == [SampleKey(0, index) for index in range(6)]
