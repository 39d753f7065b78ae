from __future__ import annotations

from zoo.engine.randoms import uniform


def test_the_numbers_are_splitmix64s() -> None:
    # The first outputs of the published generator from state 0, which is where seed 0 starts.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform(0, i) for i in range(3)] == [(x >> 11) / 2**53 for x in outputs]


def test_the_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= x < 1 for x in numbers)
    for tenth in range(10):
        share = sum(tenth / 10 <= x < (tenth + 1) / 10 for x in numbers) / len(numbers)
        assert abs(share - 0.1) < 0.015


def test_neighbouring_seeds_are_not_shifted_copies() -> None:
    first = {uniform(1, position) for position in range(1000)}
    assert all(uniform(2, position) not in first for position in range(1000))


def test_every_64_bit_seed_is_its_own() -> None:
    assert len({uniform(seed, 0) for seed in (0, 1, -1, 2**63, 2**64 - 2, -(2**63) + 1)}) == 6
