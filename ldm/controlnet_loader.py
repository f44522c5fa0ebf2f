"""The methods of a pipeline that load and unload ControlNets."""

from __future__ import annotations

from ldm.devices import usual_torch_state
from ldm.load_options import LoadOptions, Source
from ldm.model import LatentDiffusion


class ControlNetLoader:
    """Base of pipelines whose calls can use ControlNets."""

    model: LatentDiffusion

    @usual_torch_state()
    def load_controlnet(
        self,
        source: Source,
        name: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
    ) -> str:
        """Load a ControlNet in addition to those that are loaded, and return its name, which ``controlnets`` of a call uses.

        It has no effect on calls that do not name it, and :meth:`save_pretrained` does not write it.

        Args:
            source: a folder that diffusers wrote, a single file with the names of the original repository or of diffusers, or a
                hub id of either.
            name: name of the ControlNet; default: that of the file or folder.
            revision, subfolder, variant: as in :func:`ldm.load`.

        Raises:
            CheckpointError: the source cannot be read, or is for another kind of model.
            SamplingError: the name is taken.
        """
        from ldm.formats.controlnet import read_controlnet

        options = LoadOptions(revision=revision, subfolder=subfolder, variant=variant)
        return self.model.controlnets.add(read_controlnet(source, self.model, name, options))

    @usual_torch_state()
    def unload_controlnet(self, name: str | None = None) -> None:
        """Unload one ControlNet, or all.

        Raises:
            SamplingError: no ControlNet has this name.
        """
        self.model.controlnets.remove(name)
