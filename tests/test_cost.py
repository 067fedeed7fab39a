import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from rolldiff import Euler, Heun, Multistep, RollingSchedule
from rolldiff.cost import metered, predict


@pytest.mark.parametrize(("causal", "cache"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("step", [Euler(), Heun(), Multistep()], ids=repr)
def test_the_formula_is_the_count(make, step, causal, cache):
    decoder = make(causal=causal)

    @run_settings(max_examples=15)
    @given(st.integers(1, 16), st.floats(0, 1), st.integers(1, 5), st.booleans())
    def agree(num_groups, overlap, steps, guidance):
        cost = decoder.decode(
            [1],
            num_groups=num_groups,
            overlap=overlap,
            steps=steps,
            step=step,
            guidance=1.0 if guidance else 0.0,
            cache=cache,
            seed=0,
        ).cost
        assert (cost.nfe, cost.tokens) == predict(
            16,
            RollingSchedule(num_groups, overlap),
            steps,
            calls=step.calls,
            guidance=guidance,
            causal=causal,
            cache=cache,
        )

    agree()


def test_the_hook_is_taken_away_again(make):
    decoder = make()
    with pytest.raises(RuntimeError), metered(decoder.backbone):
        raise RuntimeError
    assert not decoder.backbone._forward_hooks


def test_only_a_module_can_be_counted():
    with pytest.raises(Exception, match="backbone"), metered(print):
        pass


def test_two_streams_at_once_count_their_own_calls(make):
    decoder = make()
    streams = [decoder.stream(num_groups=2, steps=2, seed=s, preview=False) for s in (0, 1)]
    assert [[a.nfe, b.nfe] for a, b in zip(*streams, strict=True)] == [[n, n] for n in range(1, 5)]
