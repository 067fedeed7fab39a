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

    @run_settings(max_examples=25)
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
