"""Sampling: an empty image to start from, and the sampler."""

from comfy_api.latest import io

from . import comfy_bridge as bridge


def churn_inputs(s_churn: float, limits: str = "", advanced: bool = False) -> list[io.Input]:
    """EDM's noise during sampling (EDM, Algorithm 2); the other defaults are EDM's for ImageNet at 64 pixels."""
    shared = dict(min=0.0, round=False, advanced=advanced or None)
    return [
        io.Float.Input(
            "s_churn",
            default=s_churn,
            max=1000.0,
            step=0.1,
            tooltip="Fresh noise before each step, which corrects errors of earlier steps and may blur. 0 adds none."
            + limits,
            **shared,
        ),
        io.Float.Input(
            "s_tmin",
            default=0.05,
            max=10000.0,
            step=0.01,
            tooltip="Churn only at noise levels from here on. Needs s_churn above 0.",
            **shared,
        ),
        io.Float.Input(
            "s_tmax",
            default=50.0,
            max=10000.0,
            step=0.1,
            tooltip="Churn only at noise levels up to here. Needs s_churn above 0.",
            **shared,
        ),
        io.Float.Input(
            "s_noise",
            default=1.003,
            max=10.0,
            step=0.001,
            tooltip="Strength of the churned noise; slightly above 1 keeps detail. Needs s_churn above 0.",
            **shared,
        ),
    ]


def schedule_inputs(limits: str = "") -> list[io.Input]:
    """The ends and the curve of EDM's sigmas (EDM, Eq. 5)."""
    shared = dict(max=10000.0, round=False, advanced=True)
    return [
        io.Float.Input(
            "sigma_min",
            default=0.002,
            min=0.00001,
            step=0.001,
            tooltip="Lowest noise level before 0." + limits,
            **shared,
        ),
        io.Float.Input(
            "sigma_max",
            default=80.0,
            min=0.00001,
            step=0.1,
            tooltip="Highest noise level, where sampling starts." + limits,
            **shared,
        ),
        io.Float.Input(
            "rho",
            default=7.0,
            min=0.1,
            step=0.1,
            tooltip="Larger spends more of the steps at low noise, on detail." + limits,
            **shared | dict(max=100.0),
        ),
    ]


class EmptyImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_EmptyImage",
            display_name="eDiff-I Empty Image",
            category="eDiff-I/sampling",
            description="A LATENT in pixel space to sample an image from.",
            search_aliases=["empty latent", "pixel space latent", "ediffi size"],
            inputs=[
                io.Int.Input(
                    "width",
                    default=64,
                    min=8,
                    max=4096,
                    step=8,
                    tooltip="In pixels. The base stage of eDiff-I paints 64; other sizes work as far as training reaches.",
                ),
                io.Int.Input("height", default=64, min=8, max=4096, step=8, tooltip="In pixels."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Images at once. With eDiff-I KSampler image i is what seed + i gives alone.",
                ),
            ],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(bridge.empty_image(width, height, batch_size))


class KSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        stochastic = ", ".join(bridge.CHURNING)
        return io.Schema(
            node_id="EDiffI_KSampler",
            has_intermediate_output=True,  # what it shows is sent again when the run is cached
            display_name="eDiff-I KSampler",
            category="eDiff-I/sampling",
            description="KSampler with EDM's schedule and churn, in which an image depends on its seed and not on its batch.",
            search_aliases=["ediffi sampler", "edm sampler", "heun churn", "karras rho"],
            inputs=[
                io.Model.Input("model", tooltip="What denoises: an ensemble, or any other MODEL."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Image i of a batch is made from seed + i, whatever the batch size.",
                ),
                io.Int.Input(
                    "steps",
                    default=25,
                    min=1,
                    max=10000,
                    tooltip="More steps follow the path more exactly, and take longer.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt pulls. 1 is the plain conditional model and skips the negative.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(bridge.SAMPLERS),
                    default="heun",
                    tooltip="heun is EDM's and eDiff-I's: second order, two calls of the model a step.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(bridge.SCHEDULERS),
                    default=bridge.SCHEDULERS[0],
                    tooltip="edm uses sigma_min, sigma_max and rho below; the others are ComfyUI's and do not.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What cfg moves away from. An empty prompt is the paper's: no text at all.",
                ),
                io.Latent.Input("latent_image", tooltip="eDiff-I Empty Image, or an encoded image to start from."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule runs, so the given image shows through.",
                ),
                *schedule_inputs(" Only for the scheduler edm."),
                *churn_inputs(0.0, f" Only for {stochastic}; other samplers ignore it.", advanced=True),
            ],
            outputs=[io.Latent.Output("latent", tooltip="The sampled images, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
        sigma_min, sigma_max, rho, s_churn, s_tmin, s_tmax, s_noise,
    ) -> io.NodeOutput:  # fmt: skip
        sigmas = bridge.schedule(model, scheduler, sampler_name, steps, denoise, sigma_min, sigma_max, rho)
        sampler = bridge.sampler_named(sampler_name, s_churn, s_tmin, s_tmax, s_noise)
        timeline = bridge.timeline(model, sigmas)
        bridge.announce(timeline)
        latent = bridge.sample(model, seed, cfg, sampler, sigmas, positive, negative, latent_image)
        return io.NodeOutput(latent, ui=bridge.shown(timeline))


class EDMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_EDMSampler",
            display_name="eDiff-I EDM Sampler",
            category="eDiff-I/sampling",
            description="EDM's stochastic sampler for SamplerCustom and SamplerCustomAdvanced: a little fresh noise, then one "
            "step of the solver. Image i of a batch adds what seed + i gives alone.",
            search_aliases=["edm sampler", "churn", "heun", "karras stochastic", "algorithm 2"],
            inputs=[
                io.Combo.Input(
                    "solver",
                    options=list(bridge.CHURNING),
                    default="heun",
                    tooltip="heun is EDM's and eDiff-I's: second order, two calls of the model a step. euler takes one.",
                ),
                *churn_inputs(40.0),
            ],
            outputs=[io.Sampler.Output("sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, solver, s_churn, s_tmin, s_tmax, s_noise) -> io.NodeOutput:
        return io.NodeOutput(bridge.edm_sampler(solver, s_churn, s_tmin, s_tmax, s_noise))


class DynamicThresholding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_DynamicThresholding",
            display_name="eDiff-I Dynamic Thresholding",
            category="eDiff-I/sampling",
            description="Keeps the colors of a strongly guided pixel-space MODEL in range, by Imagen's dynamic thresholding.",
            search_aliases=["dynamic thresholding", "static thresholding", "imagen", "oversaturated", "high cfg"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL in pixel space, such as an eDiff-I ensemble."),
                io.Float.Input(
                    "percentile",
                    default=0.995,
                    min=0.5,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="The share of values that are not cut; all are then scaled down to fit. Higher scales more, towards "
                    "gray; lower cuts more.",
                ),
                io.Float.Input(
                    "maximum",
                    default=100.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=False,
                    tooltip="How far an image may be scaled down at most. 1 is static thresholding: it is only cut.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, model, percentile: float, maximum: float) -> io.NodeOutput:
        return io.NodeOutput(bridge.with_thresholding(model, percentile, maximum))


NODES = [EmptyImage, KSampler, EDMSampler, DynamicThresholding]
