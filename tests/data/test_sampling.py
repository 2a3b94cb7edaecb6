import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmamba.data import EpochSampler, SampleKey

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


@given(LENGTHS, WORLDS, SEEDS, st.booleans(), st.booleans())
def test_ranks_partition_the_samples(
    length: int, world_size: int, seed: int, shuffle: bool, even: bool
) -> None:
    def rank(number: int) -> EpochSampler:
        return EpochSampler(length, seed=seed, shuffle=shuffle, rank=number, world_size=world_size, even=even)

    one = list(EpochSampler(length, seed=seed, shuffle=shuffle))
    ranks = [list(rank(number)) for number in range(world_size)]
    assert [len(rank(number)) for number in range(world_size)] == [len(keys) for keys in ranks]
    dealt = [keys[turn] for turn in range(max(map(len, ranks))) for keys in ranks if turn < len(keys)]
    assert dealt == (one[: length - length % world_size] if even else one)
    if even:
        assert len({len(keys) for keys in ranks}) == 1


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
