"""Limits on what a request may ask for, and on what the server takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config import config_field
from ldm.errors import SamplingError
from ldm.sampling_settings import SamplingSettings


@dataclass(frozen=True)
class Limits:
    """Limits of a server; each is an option of the command."""

    max_n: int = config_field(8, "largest number of images of a request")
    max_steps: int = config_field(150, "largest number of sampling steps")
    max_pixels: int = config_field(1024 * 1024, "largest number of pixels of a generated image")
    max_prompt: int = config_field(8000, "largest number of characters of a prompt")
    max_seconds: float = config_field(600.0, "seconds after which the sampling of an image is ended")
    max_waiting: int = config_field(64, "largest number of images that wait; further requests get 429")
    max_running: int = config_field(8, "number of images that are computed at once")
    max_upload_bytes: int = config_field(20 * 2**20, "largest size of a request in bytes, with its images")
    max_upload_pixels: int = config_field(4096 * 4096, "largest number of pixels of an image that is sent")
    upload_seconds: float = config_field(30.0, "seconds within which a request must have arrived")

    def check(self, settings: SamplingSettings, size: tuple[int, int]) -> None:
        """Check the settings of a request.

        Args:
            settings: of all images of the request.
            size: height and width where the settings give none.

        Raises:
            SamplingError: a number is above its limit.
        """
        grid = settings.timesteps if settings.timesteps is not None else settings.sigmas
        steps = len(grid) if grid is not None else settings.num_inference_steps or 1
        height, width = settings.height or size[0], settings.width or size[1]
        texts = [each for each in (settings.prompt, settings.negative_prompt) if isinstance(each, str)]
        for name, value, most in (
            ("n", settings.num_images_per_prompt, self.max_n),
            ("the number of steps", steps, self.max_steps),
            ("the number of pixels, height times width,", height * width, self.max_pixels),
            ("the number of characters of the prompt", max(map(len, texts), default=0), self.max_prompt),
        ):
            if value > most:
                raise SamplingError(f"{name} is {value}; this server allows at most {most}.")
