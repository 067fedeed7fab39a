"""Decoders inside pipelines of diffusers, and networks of diffusers inside decoders."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from rolldiff import ClassLabels, DecodeConfig, Decoder, Patches, TokenGrid, Training
from rolldiff.diffusion.process import PerSampleNoise
from rolldiff.errors import UsageError
from rolldiff.hub import build

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing is tested")

from rolldiff.integrations.diffusers import (  # noqa: E402
    DiffusersBackbone,
    DiffusersDecoder,
    Network,
)

LATENTS = 2, 4, 4, 4


def shaken(module, std=0.15):
    """Random weights throughout, the zero-initialised ones too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


@pytest.fixture
def latent_decoder():
    """4 x 4 latents of 4 channels to 16 x 16 pixels."""
    training = Training(num_groups=(1, 2, 4), orders=("top_to_bottom", "random:0"))
    return shaken(
        Decoder.build(
            image_size=16,
            patch=4,
            width=16,
            depth=1,
            heads=2,
            condition=TokenGrid(4, 4, channels=4),
            training=training,
        )
    )


def dit(**settings):
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 1,
        "norm_num_groups": 1,
        "num_embeds_ada_norm": 10,
    } | settings
    return shaken(diffusers.DiTTransformer2DModel(**settings))


def unet(**settings):
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    } | settings
    return shaken(diffusers.UNet2DModel(**settings), std=0.05)


def pipeline(vae):
    network = dit(num_embeds_ada_norm=1000, out_channels=4)
    return diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler())


def images(pipe, seed=0):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe([1, 2], num_inference_steps=2, output_type="np", generator=generator).images


# ---- a decoder as an autoencoder


def test_a_pipeline_decodes_with_it(latent_decoder, tmp_path):
    config = DecodeConfig(num_groups=4, overlap=0.5, steps=2)
    vae = DiffusersDecoder(latent_decoder, decode_config=config, scaling_factor=0.5)
    pipe = pipeline(vae)
    assert images(pipe).shape == (2, 16, 16, 3)
    assert (images(pipe) == images(pipe)).all()
    assert (images(pipe) != images(pipe, seed=1)).any()
    vae.decoding = replace(config, num_groups=2, order="random:0")
    changed = images(pipe)

    pipe.save_pretrained(tmp_path)
    read = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(read.vae) is DiffusersDecoder
    assert read.vae.decoding == vae.decoding
    assert read.vae.config.decode_config["num_groups"] == 2
    assert (images(read) == changed).all()


def test_it_is_decode_with_a_grid(latent_decoder):
    config = DecodeConfig(num_groups=2, steps=3, guidance=0.5)
    vae = DiffusersDecoder(latent_decoder, decode_config=config)
    z = torch.randn(LATENTS)
    grid = z.permute(0, 2, 3, 1)

    def wanted(grid=grid, steps=3, seed=0):
        ask = {"num_groups": 2, "steps": steps, "guidance": 0.5, "seed": seed}
        return latent_decoder.decode(grid, **ask).image

    assert torch.equal(vae.decode(z).sample, wanted())
    assert torch.equal(vae(z, return_dict=False)[0], wanted())
    assert torch.equal(vae.decode(z, num_inference_steps=2).sample, wanted(steps=2))

    def generator(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(vae.decode(z, generator=generator(3)).sample, wanted(seed=generator(3)))
    each = vae.decode(z, generator=[generator(3), generator(4)]).sample
    alone = [wanted(grid[i : i + 1], seed=generator(3 + i)) for i in range(2)]
    assert torch.equal(each, torch.cat(alone))
    vae.seed = None
    assert not torch.equal(vae.decode(z).sample, vae.decode(z).sample)


def test_what_pipelines_read(latent_decoder):
    vae = DiffusersDecoder(latent_decoder, scaling_factor=0.18, force_upcast=True)
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 4
    assert vae.config.latent_channels == 4
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.18, None)
    assert vae.config.force_upcast
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))
    half = vae.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    image = half.decode(torch.randn(LATENTS, dtype=torch.bfloat16), num_inference_steps=1).sample
    assert image.isfinite().all()


def test_round_trip(latent_decoder, tmp_path):
    config = DecodeConfig(num_groups=2, steps=2)
    vae = DiffusersDecoder(latent_decoder, decode_config=config, encoder=nn.Conv2d(3, 4, 4, 4))
    vae.decoding = replace(config, overlap=0.5)
    vae.save_pretrained(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["decoder"] == latent_decoder.to_config()

    read = DiffusersDecoder.from_pretrained(tmp_path, encoder=nn.Conv2d(3, 4, 4, 4))
    z = torch.randn(LATENTS)
    assert torch.equal(read.decode(z).sample, vae.decode(z).sample)
    x = torch.randn(2, 3, 16, 16)
    latents = vae.encode(x).latents
    assert latents.shape == LATENTS
    assert torch.equal(read.encode(x, return_dict=False)[0], latents)

    half = DiffusersDecoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.encoder is None
    assert half.dtype == torch.bfloat16
    # Tables are not rounded with the weights.
    ours, theirs = half.model.backbone._rope, latent_decoder.backbone._rope
    assert torch.equal(ours, theirs)

    config["decoder"]["backbone"]["_target_"] = "torch.nn.Linear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must name a class of rolldiff"):
        DiffusersDecoder.from_pretrained(tmp_path)


def test_what_it_refuses(latent_decoder):
    vae = DiffusersDecoder(latent_decoder)
    with pytest.raises(ValueError, match="encode needs an encoder"):
        vae.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"z must have shape \(B, 4, 4, 4\)"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="generator must be 2"):
        vae.decode(torch.zeros(LATENTS), generator=[torch.Generator()])
    with pytest.raises(ValueError, match="encoder's latents must have shape"):
        DiffusersDecoder(latent_decoder, encoder=nn.Identity()).encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="as the decoder has them"):
        DiffusersDecoder(latent_decoder, latent_channels=3)
    with pytest.raises(ValueError, match="got no condition"):
        DiffusersDecoder(Decoder.build(image_size=8))
    labels = Decoder.build(image_size=8, condition=ClassLabels(3))
    with pytest.raises(ValueError, match="single TokenGrid"):
        DiffusersDecoder(labels)
    thirds = Decoder.build(image_size=12, condition=TokenGrid(2, 2, channels=4))
    with pytest.raises(ValueError, match="power of two"):
        DiffusersDecoder(thirds)


# ---- a network as a backbone


def decoder_of(network, patch=1, **training):
    size = network.config.sample_size
    layout = Patches(size, channels=network.config.in_channels, patch=patch)
    training = Training(**({"drop_cond": 0.0} | training))
    return Decoder(
        layout, DiffusersBackbone(layout, network), prediction="velocity", training=training
    )


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_one_group_is_the_network_itself(name, patch):
    network = dit(out_channels=8) if name == "dit" else unet(num_class_embeds=5)
    decoder = decoder_of(network, patch)
    backbone, layout = decoder.backbone, decoder.layout
    image = torch.randn(2, *layout.image_shape)
    label = torch.tensor([1, 3])
    order = torch.randperm(layout.num_tokens)
    cond = decoder.conditioning.validate(label, 2, image.device)
    context = backbone.prepare(order, cond, grouped=False)
    t = torch.tensor([0.3])
    with torch.no_grad():
        y = backbone(layout.tokens(image)[:, order], backbone.embed_time(t), context)
        wanted = network(image, torch.tensor([300.0, 300.0]), class_labels=label).sample
    ours = layout.image(y[:, order.argsort()])
    torch.testing.assert_close(ours, wanted[:, : layout.channels])


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_decode_is_an_euler_loop_of_diffusers(name):
    network = dit() if name == "dit" else unet()
    decoder = decoder_of(network, patch=2)
    layout, steps = decoder.layout, 5
    cond = 7 if name == "dit" else None
    label = torch.full((2,), 7) if name == "dit" else None
    ours = decoder.decode(cond, num_images=2, steps=steps, seed=3).image

    noise = PerSampleNoise(3, 2).normal(layout.num_tokens, layout.token_dim)
    x = layout.image(noise)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = network(x, t.expand(2), class_labels=label).sample
            x = scheduler.step(velocity, t, x).prev_sample
    assert (ours - x).abs().max() < 1e-5 * x.abs().max().clamp(min=1)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_time_for_each_token_of_a_dit(patch):
    decoder = decoder_of(dit(sample_size=8), patch)
    backbone, layout = decoder.backbone, decoder.layout
    order = torch.randperm(layout.num_tokens)
    group = torch.arange(layout.num_tokens) * 4 // layout.num_tokens
    context = backbone.prepare(order, decoder.conditioning.validate(2, 2, order.device))
    x_t = torch.randn(2, layout.num_tokens, layout.token_dim)

    def call(t):
        with torch.no_grad():
            return backbone(x_t, backbone.embed_time(t), context)

    # Equal times: as if there were one.
    same = torch.full((layout.num_tokens,), 0.6)
    torch.testing.assert_close(call(same), call(same[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call(same.expand(2, -1)), call(same[:1]), rtol=1e-4, atol=1e-5)
    each = backbone.prepare(
        order.expand(2, -1),
        decoder.conditioning.validate(2, 2, order.device),
    )
    mixed = torch.rand(layout.num_tokens)
    with torch.no_grad():  # an order and times for each example
        batched = backbone(x_t, backbone.embed_time(mixed.expand(2, -1)), each)
    torch.testing.assert_close(batched, call(mixed), rtol=1e-4, atol=1e-5)
    # Without attention a token knows no time but its own, so this says whose time is whose.
    for block in backbone.network.transformer_blocks:
        nn.init.zeros_(block.attn1.to_out[0].weight)
        nn.init.zeros_(block.attn1.to_out[0].bias)
    low, high = same * 0.5, same
    mixed = torch.where(group < 2, low, high)
    wanted = torch.where((group < 2)[:, None], call(low), call(high))
    torch.testing.assert_close(call(mixed), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_groups_and_guidance_of_a_dit():
    decoder = decoder_of(dit(), num_groups=(1, 4), orders=("top_to_bottom", "random:0"))
    ask = {"num_groups": 4, "overlap": 0.5, "steps": 4, "order": "random:0", "seed": 0}
    label = torch.tensor([3, 4])
    decoded = decoder.decode(label, guidance=1.0, **ask)
    assert decoded.image.isfinite().all()
    assert not decoded.cost.cached
    one = decoder.decode(label[1:], guidance=1.0, start_index=1, **ask).image
    torch.testing.assert_close(decoded.image[1:], one, rtol=1e-4, atol=1e-5)
    # Guidance by hand: the null label is the row behind the classes.
    with_null = decoder.decode(label, guidance=-1.0, **ask).image
    torch.testing.assert_close(
        with_null, decoder.decode(num_images=2, **ask).image, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_it_trains(name):
    if name == "dit":
        decoder = decoder_of(dit(), num_groups=(1, 4), drop_cond=0.5).train()
    else:
        decoder = decoder_of(unet(num_class_embeds=5), patch=2).train()
    image = torch.rand(4, *decoder.layout.image_shape) * 2 - 1
    label = torch.arange(4)
    losses = [
        decoder.loss(image, label, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    ]
    assert losses[0] == losses[1]  # the network draws nothing itself
    losses[0].backward()
    (table,) = [
        parameter
        for key, parameter in decoder.named_parameters()
        if "class_embedding" in key or "blocks.0.norm1.emb.class_embedder" in key
    ]
    assert table.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_decoder_with_a_network_is_saved(name, tmp_path):
    network = dit() if name == "dit" else unet(num_class_embeds=5)
    decoder = decoder_of(network)
    decoder.save_pretrained(tmp_path)
    read = Decoder.from_pretrained(tmp_path)
    assert read.to_config() == decoder.to_config()
    ask = {"steps": 2, "seed": 0, "num_images": 1}
    assert torch.equal(read.decode(3, **ask).image, decoder.decode(3, **ask).image)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("decoder", {"decoder": "decoder"}),
        ("encoder", {"encoder": len}),
        ("decode_config", {"decode_config": 4}),
        ("decode_config", {"decode_config": {"_target_": "rolldiff.Euler"}}),
        ("seed", {"seed": 0.5}),
        ("seed", {"seed": True}),
        ("scaling_factor", {"scaling_factor": float("nan")}),
        ("shift_factor", {"shift_factor": "0"}),
        ("force_upcast", {"force_upcast": 1}),
        ("latent_channels", {"latent_channels": 4.0}),
        ("block_out_channels", {"block_out_channels": 4}),
    ],
)
def test_wrong_arguments_of_an_autoencoder(latent_decoder, word, arguments):
    with pytest.raises(UsageError, match=f"^{word} must"):
        DiffusersDecoder(**{"decoder": latent_decoder} | arguments)


@pytest.mark.usefixtures("unchecked")
def test_wrong_latents(latent_decoder):
    vae = DiffusersDecoder(latent_decoder)
    z = torch.zeros(2, 4, 4, 4)
    for wrong in (z.numpy(), z.long(), z * float("nan"), z.to("meta"), z[:, :1], None):
        with pytest.raises(UsageError, match="^z must"):
            vae.decode(wrong)
    for wrong in (0, [0, 1], "g"):
        with pytest.raises(UsageError, match="generator must"):
            vae.decode(z, generator=wrong)
    for wrong in (0, 1.5, True, "2"):
        with pytest.raises(UsageError, match="^steps must"):
            vae.decode(z, num_inference_steps=wrong)


@pytest.mark.parametrize(
    "settings",
    [
        (("num_layers", 10**6),),
        (("sample_size", 2**20), ("num_attention_heads", 8), ("attention_head_dim", 64)),
        (("block_out_channels", (8,) * 1000),),
        (("in_channels",),),
        ((3, 4),),
        "num_layers",
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_no_network_has(settings):
    with pytest.raises(UsageError, match="must"):
        Network("DiTTransformer2DModel", settings)


def test_networks_that_are_refused():
    with pytest.raises(ValueError, match="network must be one of DiTTransformer2DModel"):
        build({"_target_": "rolldiff.integrations.diffusers.Network", "name": "DiTPipeline"})
    layout = Patches(8, channels=1, patch=2)
    with pytest.raises(ValueError, match="network must be one of"):
        DiffusersBackbone(layout, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="must have 1 channels"):
        DiffusersBackbone(layout, dit())
    with pytest.raises(ValueError, match="image_size must divide by 2, got"):
        DiffusersBackbone(Patches(9, channels=1), unet())
    with pytest.raises(ValueError, match="divide by 1 and be square"):
        DiffusersBackbone(Patches((4, 8), channels=4), dit())
    with pytest.raises(ValueError, match="time_embedding_type positional"):
        DiffusersBackbone(layout, unet(time_embedding_type="fourier"))
    with pytest.raises(ValueError, match=r"num_classes must be in 1 … 5"):
        DiffusersBackbone(layout, unet(num_class_embeds=5), num_classes=6)
    fresh = DiffusersBackbone(layout, Network.of(unet()))
    assert fresh.network.config.block_out_channels == (8, 16)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_what_a_network_cannot_take():
    decoder = decoder_of(unet(), patch=2, num_groups=(1, 2))
    with pytest.raises(ValueError, match="num_groups must be 1 for a UNet2DModel.*got several"):
        decoder.decode(num_groups=2, steps=2)
    coarse = decoder_of(dit(patch_size=2), patch=1, num_groups=(1, 2))
    assert coarse.decode(1, num_images=1, steps=1).image.isfinite().all()
    with pytest.raises(ValueError, match="patch must be a multiple of the network's patch_size"):
        coarse.decode(1, num_images=1, num_groups=2, steps=2)
    # All rows are classes: nothing stands for no label.
    network = unet(num_class_embeds=5)
    with pytest.raises(ValueError, match="must have a label for every example"):
        decoder_of(network).decode(steps=1)
    layout = Patches(8, channels=1)
    spared = Decoder(layout, DiffusersBackbone(layout, network, num_classes=4))
    assert spared.decode(steps=1, seed=0).image.isfinite().all()


@pytest.mark.slow
def test_it_stays_outside():
    code = (
        "import sys, rolldiff; assert 'diffusers' not in sys.modules\n"
        "sys.modules['diffusers'] = None\n"
        "try: import rolldiff.integrations.diffusers\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "rolldiff.integrations.diffusers needs: pip install diffusers\n"
