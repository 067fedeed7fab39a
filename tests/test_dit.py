"""DiT computes what the published networks compute, and with masks and the cache what it should."""

import argparse
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from autoencoders import tiny_kl
from safetensors.torch import save_file

from rolldiff import (
    ClassLabels,
    Decoder,
    DiT,
    Guidance,
    LinearBeta,
    Patches,
    Rectified,
    TokenGrid,
    TokenSequence,
    Training,
)
from rolldiff.errors import UsageError
from rolldiff.integrations.autoencoder import Autoencoder
from rolldiff.integrations.dit import load_dit, to_diffusers
from rolldiff.training.initial import start_from

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing is tested")

EXACT = {"rtol": 0, "atol": 1e-10}
SIZES = {"width": 16, "depth": 2, "heads": 2}


def shaken(module, std=0.2):
    """Random weights throughout, the zero-initialised ones too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.double().eval()


def network(**settings):
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "norm_num_groups": 1,
        "num_embeds_ada_norm": 10,
    } | settings
    return shaken(diffusers.DiTTransformer2DModel(**settings))


def tied(net):
    """All blocks with the embedding of the first, as in converted checkpoints."""
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


def original(*, width=16, depth=2, side=4, patch=2, channels=4, out=8, classes=10, seed=0):
    """Random weights in the names of DiT's and SiT's files."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def linear(name, inputs, outputs):
        return {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}

    state = {
        "pos_embed": places(side, width)[None],
        "x_embedder.proj.weight": draw(width, channels, patch, patch),
        "x_embedder.proj.bias": draw(width),
        "y_embedder.embedding_table.weight": draw(classes + 1, width),
    }
    state |= linear("t_embedder.mlp.0", 256, width) | linear("t_embedder.mlp.2", width, width)
    for i in range(depth):
        state |= linear(f"blocks.{i}.attn.qkv", width, 3 * width)
        state |= linear(f"blocks.{i}.attn.proj", width, width)
        state |= linear(f"blocks.{i}.mlp.fc1", width, 4 * width)
        state |= linear(f"blocks.{i}.mlp.fc2", 4 * width, width)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", width, 6 * width)
    state |= linear("final_layer.linear", width, patch * patch * out)
    return state | linear("final_layer.adaLN_modulation.1", width, 2 * width)


def places(side, width):
    """Sines and cosines of the column, then of the row, one by one."""
    table = np.empty((side * side, width))
    for row in range(side):
        for column in range(side):
            for i in range(width // 4):
                omega = 10000 ** (-i / (width / 4))
                for part, place in enumerate((column, row)):
                    start = part * width // 2 + i
                    table[row * side + column, start] = math.sin(place * omega)
                    table[row * side + column, start + width // 4] = math.cos(place * omega)
    return torch.from_numpy(table.astype(np.float32)).double()


def reference(state, x, time, label, *, heads=2):
    """DiT by its equations, for weights in its own names; one time per image."""

    def linear(h, name):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(h):
        return F.layer_norm(h, h.shape[-1:], eps=1e-6)

    def modulated(h, shift, scale):
        return norm(h) * (1 + scale[:, None]) + shift[:, None]

    proj, out = state["x_embedder.proj.weight"], len(state["final_layer.linear.bias"])
    patch, channels = proj.shape[-1], x.shape[1]
    h = F.conv2d(x, proj, state["x_embedder.proj.bias"], stride=patch).flatten(2).mT
    h = h + state["pos_embed"]
    frequency = torch.exp(-math.log(10000) * torch.arange(128.0) / 128)
    angle = time.float()[:, None] * frequency
    features = torch.cat([angle.cos(), angle.sin()], dim=1).double()
    c = linear(F.silu(linear(features, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(c + state["y_embedder.embedding_table.weight"][label])
    depth = sum(name.endswith("attn.qkv.bias") for name in state)
    for i in range(depth):
        block = f"blocks.{i}."
        parts = linear(c, f"{block}adaLN_modulation.1").chunk(6, dim=1)
        q, k, v = linear(modulated(h, *parts[:2]), f"{block}attn.qkv").chunk(3, dim=-1)
        mixed = torch.empty_like(q)
        for part in torch.arange(q.shape[-1]).chunk(heads):
            score = q[..., part] @ k[..., part].mT / len(part) ** 0.5
            mixed[..., part] = score.softmax(-1) @ v[..., part]
        h = h + parts[2][:, None] * linear(mixed, f"{block}attn.proj")
        up = F.gelu(linear(modulated(h, *parts[3:5]), f"{block}mlp.fc1"), approximate="tanh")
        h = h + parts[5][:, None] * linear(up, f"{block}mlp.fc2")
    y = linear(
        modulated(h, *linear(c, "final_layer.adaLN_modulation.1").chunk(2, 1)), "final_layer.linear"
    )
    side = x.shape[-1] // patch
    y = y.view(len(x), side, side, patch, patch, out // patch**2)
    y = y.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])
    return y[:, :channels]


def called(decoder, x, t, label):
    """What the decoder's network predicts for images that have one time each."""
    net, layout = decoder.backbone, decoder.layout
    cond = decoder.conditioning.validate(label, len(x), x.device)
    context = net.prepare(torch.arange(layout.num_tokens), cond)
    tokens = layout.tokens(x)
    with torch.no_grad():
        return layout.image(net(tokens, net.embed_time(t[:, None]), context))


def inputs(channels=4, side=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, side, side, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 371, 999]), torch.tensor([1, 5, 9])


@pytest.mark.parametrize("make", [network, lambda **s: tied(network(**s))], ids=["own", "tied"])
def test_it_equals_diffusers_for_one_time_per_image(make):
    theirs = make(norm_eps=1e-4)
    decoder = load_dit(theirs)
    assert decoder.latents
    assert decoder.backbone.copies == (2 if make is network else 1)
    x, step, label = inputs()
    with torch.no_grad():
        expected = theirs(x, step, class_labels=label).sample[:, :4]
    torch.testing.assert_close(
        called(decoder, x, (step + 1).double() / 1000, label), expected, **EXACT
    )


@pytest.mark.parametrize("kind", ["dit", "sit"])
@pytest.mark.parametrize("out", [4, 8])
def test_it_equals_the_equations_of_the_original(kind, out):
    state = original(out=out)
    decoder = load_dit(state, kind=kind, heads=2)
    x, step, label = inputs()
    if kind == "dit":
        t, time, sign = (step + 1).double() / 1000, step, 1
        assert (decoder.noise, decoder.prediction) == (LinearBeta(), "eps")
    else:  # SiT's time is that of the data, and its velocity points there
        t = step.double() / 999
        time, sign = 1 - t, -1
        assert (decoder.noise, decoder.prediction) == (Rectified(), "velocity")
    expected = sign * reference(state, x, time, label)
    torch.testing.assert_close(called(decoder, x, t, label), expected, **EXACT)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_decoding_with_one_group_is_ddim(guidance):
    theirs = tied(network())
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # it rounds its own to float32
    scheduler.alphas_cumprod = (1 - beta).cumprod(0)
    scheduler.set_timesteps(5)
    x, _, label = inputs()
    noise = x.clone()
    with torch.no_grad():
        for step in scheduler.timesteps:
            t = step.expand(len(x))
            eps = theirs(x, t, class_labels=label).sample[:, :4]
            null = theirs(x, t, class_labels=torch.full_like(label, 10)).sample[:, :4]
            eps = eps + guidance * (eps - null)
            x = scheduler.step(eps, step, x).prev_sample
    decoder = load_dit(theirs)
    found = decoder.decode(label, noise=noise, steps=5, guidance=guidance).image
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_a_decoding_of_sit_is_eulers_rule():
    state = original()
    x, _, label = inputs()
    decoder = load_dit(state, kind="sit", heads=2)
    found = decoder.decode(label, noise=x, steps=4).image
    for i in range(4):
        x = x + reference(state, x, torch.full((3,), i / 4), label) / 4
    torch.testing.assert_close(found, x, **EXACT)


def grouped(**settings):
    layout = Patches(8, channels=1, patch=2)
    training = Training((1, 2, 4, 16), orders=("top_to_bottom", "random:0"))
    net = DiT(layout, **SIZES | {"condition": ClassLabels(3)} | settings)
    return shaken(Decoder(layout, net, training=training))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_groups": 1},
        {"num_groups": 4},
        {"num_groups": 16, "order": "random:0"},
        {"num_groups": 4, "overlap": 0.5, "guidance": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("separate", [False, True])
def test_the_cache_is_exact(settings, separate):
    decoder = grouped(separate_embeddings=separate)
    both = [
        decoder.decode([0, 2], seed=0, steps=4, cache=cache, **settings) for cache in (True, False)
    ]
    torch.testing.assert_close(both[0].image, both[1].image, rtol=1e-11, atol=1e-11)
    assert [each.cost.cached for each in both] == [True, False]
    if settings["num_groups"] > 1:
        assert both[0].cost.tokens < both[1].cost.tokens


def test_the_gradient_to_later_groups_is_zero():
    net = grouped().backbone
    group = torch.arange(16) // 4
    mask = torch.zeros(16, 16).masked_fill(group[:, None] < group, -torch.inf)
    time = net.embed_time(torch.rand(16, dtype=torch.float64))
    context = net.prepare(torch.randperm(16))
    call = partial(net, time=time, context=context, mask=mask)
    x = torch.randn(1, 16, 4, dtype=torch.float64)
    reached = torch.autograd.functional.jacobian(call, x)[0].abs().amax((1, 2, 4)) > 0
    assert torch.equal(reached, group[:, None] >= group)


def test_every_token_has_its_own_time():
    """A token with the time of a call in which all have it gets what it gets there, seen alone."""
    net = grouped().backbone
    x, t = torch.randn(2, 16, 4, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    context = net.prepare(torch.arange(16))
    alone = torch.zeros(16, 16).fill_diagonal_(1).log()  # minus infinity but for itself
    own = net(x, net.embed_time(t), context, mask=alone)
    for i in (0, 7):
        single = net(x, net.embed_time(t[i : i + 1]), context, mask=alone)
        torch.testing.assert_close(own[:, i], single[:, i], **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_from_one_group_to_all(checkpointing):
    """A published checkpoint starts a training for every setting; the loss falls on one batch."""
    source = load_dit(shaken(tied(network(in_channels=1, out_channels=2)), std=0.05)).float()
    layout = source.layout
    net = DiT(**source.backbone.config | {"gradient_checkpointing": checkpointing})
    model = Decoder(
        layout,
        net,
        noise=source.noise,
        prediction="eps",
        training=Training((1, 2, 4, 16), overlap=(0.0, 0.5)),
    )
    assert start_from(model, source) == []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.manual_seed(0)
    image = torch.rand(8, 1, 8, 8) * 2 - 1
    label = torch.arange(8)
    losses = []
    for _ in range(30):
        loss = model.loss(image, label, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_fresh_network_starts_from_zero_and_learns_everywhere():
    layout = Patches(8, channels=1, patch=2)
    decoder = Decoder(layout, DiT(layout, **SIZES), prediction="velocity")
    context = decoder.backbone.prepare(torch.arange(16))
    x = torch.randn(2, 16, 4)
    assert (decoder.backbone(x, decoder.backbone.embed_time(torch.rand(1)), context) == 0).all()


def test_grids_are_conditions_too():
    decoder = grouped(condition=TokenGrid(2, 2, channels=3))
    grids = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64)
    images = [decoder.decode(grid, seed=0, steps=2, num_groups=2).image for grid in grids]
    assert not torch.allclose(*images)
    changed = grids[0].clone()
    changed[:, 1] += 1  # the lower half, on which the upper half does not depend
    image = decoder.decode(changed, seed=0, steps=2, num_groups=2).image
    torch.testing.assert_close(image[:, :, :4], images[0][:, :, :4], **EXACT)
    assert not torch.allclose(image[:, :, 4:], images[0][:, :, 4:])


def test_it_is_saved_and_read(tmp_path):
    decoder = load_dit(tied(network())).float()
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert again.backbone.config == decoder.backbone.config
    kept = [d.decode([3], seed=0, steps=2).image for d in (decoder, again)]
    torch.testing.assert_close(*kept, rtol=0, atol=0)


@pytest.mark.parametrize("make", [network, lambda: tied(network())], ids=["own", "tied"])
def test_it_goes_back_to_diffusers(make):
    theirs = make()
    again = to_diffusers(load_dit(theirs))
    x, step, label = inputs()
    with torch.no_grad():
        expected = theirs(x, step, class_labels=label).sample[:, :4]
        torch.testing.assert_close(again(x, step, class_labels=label).sample, expected, **EXACT)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (lambda: load_dit(original(), heads=2), "frequency_shift 1, .* got 0"),
        (lambda: load_dit(network(), kind="sit"), r"timestep \(1000.0, -1.0\)"),
        (lambda: grouped(condition=None, frequency_shift=1), "conditions 1"),
        (lambda: Decoder.build(image_size=8), "must have a DiT, got a Transformer"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(decoder, words):
    with pytest.raises(UsageError, match=words):
        to_diffusers(decoder())


def written(state, path):
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "training.pt"])
def test_files_are_read(tmp_path, name):
    state = original()
    content = {"model": original(seed=1), "ema": state} if name == "training.pt" else state
    decoder = load_dit(written(content, tmp_path / name), heads=2)
    x, step, label = inputs()
    found = called(decoder, x, (step + 1).double() / 1000, label)
    torch.testing.assert_close(found, reference(state, x, step, label), **EXACT)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


BAD = {
    "missing": (lambda s: without(s, "blocks.1.mlp.fc2.bias"), "blocks.1.mlp.down.bias none, and"),
    "unexpected": (lambda s: s | {"q_norm": s["pos_embed"]}, "q_norm .*, and none in a DiT"),
    "no patches": (lambda s: without(s, "x_embedder.proj.weight"), "4 axes of embed.weight"),
    "another": (lambda s: {"conv.weight": s["pos_embed"]}, "weights of a DiT"),
    "places": (lambda s: s | {"pos_embed": s["pos_embed"] + 1}, "pos_embed must be"),
    "shape": (
        lambda s: s | {"blocks.0.attn.qkv.weight": s["pos_embed"][0]},
        r"attn.qkv.weight \(16, 16\), and \(48, 16\)",
    ),
    "infinite": (
        lambda s: s | {"final_layer.linear.bias": s["final_layer.linear.bias"] / 0},
        "finite weights",
    ),
    "mixed": (lambda s: s | {"pos_embed": s["pos_embed"].half()}, "one type"),
    "no tensor": (lambda s: s | {"args": 3}, "weights alone, got a int as 'args'"),
    "whole numbers": (lambda s: s | {"pos_embed": s["pos_embed"].long()}, "floating-point"),
    "empty": (lambda s: {}, "dictionary of weights"),
    "head": (
        lambda s: s | {"final_layer.linear.bias": s["pos_embed"][0, 0, :6]},
        "4 or 8 channels",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights(case):
    change, words = BAD[case]
    with pytest.raises(UsageError, match=words) as error:
        load_dit(change(original()), heads=2)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    files = {
        "pickled.pt": {"ema": original(), "args": argparse.Namespace(model="DiT-XL/2")},
        "list.pt": [1, 2],
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 100)
    for name in [*files, "damaged.pt", "damaged.safetensors", "absent.pt"]:
        with pytest.raises(UsageError, match=r"source (must be|cannot be read)") as error:
            load_dit(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_dit(original(), kind="pixart"), "kind must be one of dit, sit"),
        (lambda: load_dit(original()), "heads must be given for a network of width 16"),
        (lambda: load_dit(original(), heads=3), "multiple of heads"),
        (lambda: load_dit(network(), heads=0), "heads must be"),
        (lambda: load_dit(original(), heads=2, image_size=16), "pos_embed must be"),
        (lambda: load_dit(network().state_dict(), heads=2), "image_size must be given"),
        (lambda: load_dit(network(activation_fn="geglu")), "activation_fn gelu-approximate"),
        (lambda: load_dit(torch.nn.Linear(2, 2)), "DiTTransformer2DModel"),
        (lambda: load_dit(3), "source must be"),
        (lambda: grouped(condition=TokenSequence(4, channels=2)), "no cross-attention"),
        (lambda: grouped(timestep=(0.0, 1.0)), "timestep must be two numbers"),
        (lambda: grouped(timestep=(1.0,)), "timestep must be two numbers"),
        (lambda: grouped(frequency_shift=2), "frequency_shift"),
        (lambda: grouped(width=18), "multiple of heads and of 4"),
        (lambda: DiT(Patches(8), mlp_eps=0.0), "mlp_eps"),
    ],
)
def test_bad_arguments(call, words, unchecked):
    with pytest.raises(UsageError, match=words):
        call()


def test_a_training_does_not_start_from_a_network_that_only_looks_the_same():
    """Heads, timesteps and frequencies show in no weight."""
    source = load_dit(original(), heads=2)
    config = source.backbone.config
    for name, value in {"heads": 4, "timestep": (-1.0, 1.0), "frequency_shift": 1}.items():
        net = DiT(**config | {name: value})
        model = Decoder(source.layout, net.double(), noise=LinearBeta(), prediction="eps")
        with pytest.raises(UsageError, match=f"same network: {name} .* here, .* in init"):
            start_from(model, source)


def code_blocks(page):
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Small networks with random weights in place of the published ones."""
    monkeypatch.chdir(tmp_path)
    dit = tied(network(num_embeds_ada_norm=1000, sample_size=8)).float()
    vae = tiny_kl(shift_factor=None)  # which DiTPipeline does not know
    names = {"transformer": dit, "vae": vae}

    def found(name, *, subfolder):
        assert name == "facebook/DiT-XL-2-256"
        return names[subfolder]

    monkeypatch.setattr(diffusers.DiTTransformer2DModel, "from_pretrained", found)
    monkeypatch.setattr(
        Autoencoder,
        "from_pretrained",
        lambda name, *, subfolder: Autoencoder(found(name, subfolder=subfolder)),
    )
    torch.save(original(width=384, depth=1), tmp_path / "DiT-XL-2-256x256.pt")
    return dit, vae


def test_the_page_from_dit_to_grouped_runs(hub):
    grouped, once, back = code_blocks("docs/dit.md")
    assert len(grouped.strip().splitlines()) <= 25  # twenty without the imports
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    names = {"batches": [(images, torch.tensor([1, 2]))] * 2}
    exec(grouped, names)
    assert names["pictures"].shape == (2, 3, 16, 16)
    assert names["rows"].shape == (1, 3, 16, 16)
    assert names["decoder"].training_distribution.num_groups == (1, 2, 4, 8, 16)
    before, after = (names[name].backbone.head.weight for name in ("dit", "decoder"))
    assert before is after, "the same weights, trained further"
    exec(once, {})
    assert Decoder.from_pretrained("dit").latents
    exec(back, names)
    assert isinstance(names["pipeline"], diffusers.DiTPipeline)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers
def test_a_pipeline_makes_the_pictures_of_the_decoder(hub):
    """Both ways: `DiTPipeline` to rolldiff, and rolldiff to a `DiTPipeline`."""
    dit, vae = hub
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = diffusers.DiTPipeline(transformer=dit, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    decoder, autoencoder = load_dit(pipeline.transformer), Autoencoder(pipeline.vae)
    again = diffusers.DiTPipeline(transformer=to_diffusers(decoder), vae=vae, scheduler=scheduler)
    again.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = autoencoder.decode(decoder.decode([3, 7], noise=noise, steps=5, guidance=1.5).image)
    for each in (pipeline, again):
        theirs = each(
            [3, 7],
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=5,
            output_type="np",
        ).images
        expected = torch.from_numpy(theirs).movedim(-1, 1) * 2 - 1
        # In float32, over 1 / 0.0064 at the first step.
        torch.testing.assert_close(ours.clamp(-1, 1), expected, rtol=0, atol=2e-3)


def test_guidance_by_group_runs():
    decoder = grouped()
    guided = Guidance(2.0, ramp_from=0.0)
    image = decoder.decode([1], seed=0, steps=2, num_groups=4, guidance=guided).image
    plain = decoder.decode([1], seed=0, steps=2, num_groups=4, guidance=replace(guided, scale=0.0))
    torch.testing.assert_close(image[:, :, :2], plain.image[:, :, :2], **EXACT)
    assert not torch.allclose(image, plain.image)
