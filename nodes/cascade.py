"""The cascade: stages that enlarge an image four times, and the low-res image that they start from."""

from comfy_api.latest import io

from . import comfy_bridge as bridge
from .sampling import schedule_inputs


def augmentation_input() -> io.Input:
    return io.Float.Input(
        "augmentation_sigma",
        default=0.0,
        min=0.0,
        max=10.0,
        step=0.01,
        round=False,
        tooltip="Noise put on the enlarged image, whose sigma the network is told. 0 trusts the image as it is; more lets "
        "the network paint over faults of the stage before, and invent detail.",
    )


class LowResImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_LowResImage",
            display_name="eDiff-I Low-Res Image",
            category="eDiff-I/cascade",
            description="Gives prompts the image that a super-resolution ensemble enlarges, so that any sampler runs it.",
            search_aliases=["upscale conditioning", "low res", "noise augmentation", "super resolution", "4x upscale"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the image shows: the prompt of the stage before."),
                io.Conditioning.Input("negative", tooltip="What cfg moves away from. An empty prompt is no text."),
                io.Image.Input(
                    "image",
                    tooltip="The image to enlarge, of any size and from any model. Several in a batch are enlarged each by itself.",
                ),
                augmentation_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the augmentation noise: image i of a batch has that of seed + i. Without augmentation it does "
                    "nothing.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The prompt with the image, for a sampler."),
                io.Conditioning.Output("negative", tooltip="The same for the negative."),
                io.Latent.Output(
                    "latent", tooltip="Empty, four times the size of the image, one for each in the batch."
                ),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, image, augmentation_sigma: float, seed: int) -> io.NodeOutput:
        return io.NodeOutput(*bridge.low_res_image(positive, negative, image, augmentation_sigma, seed))


class SuperResolution(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_SuperResolution",
            has_intermediate_output=True,  # what it shows is sent again when the run is cached
            display_name="eDiff-I Super Resolution",
            category="eDiff-I/cascade",
            description="Enlarges an IMAGE four times with a super-resolution ensemble, as the later stages of eDiff-I do.",
            search_aliases=["upscale", "4x", "super resolution", "cascade", "imagen", "hires fix", "tiled upscale"],
            inputs=[
                io.Model.Input("model", tooltip="A super-resolution ensemble, of eDiff-I Load Ensemble."),
                io.Image.Input(
                    "image",
                    tooltip="The image to enlarge, of any size and from any model. Several in a batch are enlarged each by itself.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What the image shows, with its style and painted phrases: the prompt of the stage before. Without it "
                    "there is no text.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What cfg moves away from. Without it there is no text, as in the paper.",
                ),
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
                    default=8,
                    min=1,
                    max=10000,
                    tooltip="More steps follow the path more exactly, and take longer. The image to enlarge says most of what is "
                    "needed, so a few are enough.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt pulls. 1 is the plain conditional model, skips the negative and takes half the "
                    "time.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(bridge.SAMPLERS),
                    default="euler",
                    tooltip="euler takes one call of the model a step and is best with few; heun takes two.",
                ),
                augmentation_input(),
                io.Int.Input(
                    "tile",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Sides of the tiles that each call of the model is divided into, in pixels of the result, so that memory "
                    "does not grow with the image. 0 is the whole image at once.",
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="How much neighbouring tiles share, in pixels of the result. More hides what tiles do not know of each "
                    "other, and takes longer. Only with tiles.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule runs, on the enlarged image: it keeps more of it and invents "
                    "less.",
                ),
                *schedule_inputs(),
            ],
            outputs=[io.Image.Output("image", tooltip="Four times as wide and as high.")],
        )

    @classmethod
    def execute(
        cls, model, image, positive=None, negative=None, *, seed, steps, cfg, sampler_name, augmentation_sigma, tile, overlap,
        denoise, sigma_min, sigma_max, rho,
    ) -> io.NodeOutput:  # fmt: skip
        bridge.check_super_resolution(model)
        sigmas = bridge.schedule(model, "edm", sampler_name, steps, denoise, sigma_min, sigma_max, rho)
        sampler = bridge.sampler_named(sampler_name, 0.0, 0.0, 0.0, 1.0)
        timeline = bridge.timeline(model, sigmas)
        bridge.announce(timeline)
        image = bridge.super_resolved(
            model, image, positive, negative, seed, cfg, sampler, sigmas, augmentation_sigma, tile, overlap, denoise < 1
        )
        return io.NodeOutput(image, ui=bridge.shown(timeline))


NODES = [LowResImage, SuperResolution]
