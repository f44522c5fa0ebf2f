"""The methods of a pipeline that load, scale and unload LoRAs."""

from __future__ import annotations

from ldm.conditioning.textual_inversion import add_inversions, remove_inversions
from ldm.devices import usual_torch_state
from ldm.errors import CheckpointError
from ldm.load_options import Source
from ldm.model import LatentDiffusion


class LoRALoader:
    """Base of pipelines whose model can have LoRAs."""

    model: LatentDiffusion

    @usual_torch_state()
    def load_lora(self, source: Source, scale: float = 1.0, name: str | None = None, merge: bool = False) -> str:
        """Load a LoRA in addition to those that are already loaded, with its textual inversions, and return its name.

        Args:
            source: a file with the key names of kohya or of diffusers, a folder written by diffusers, or a hub id of either.
            scale: factor of its change.
            name: name of the LoRA; default: that of the file.
            merge: True to merge it into the weights that :meth:`save_pretrained` writes; False to compute it separately in
                each layer, without saving it.

        Raises:
            CheckpointError: the file cannot be read, or is for another model.
            SamplingError: the name is taken, or the scale is not a finite number.
        """
        from ldm.formats.lora import lora_files, read_lora
        from ldm.formats.textual_inversion import read_bundled

        files = lora_files(source)
        adapter = read_lora(source, self.model, scale, name, merge, files)
        inversions = [each for file in files.values() for each in read_bundled(file, self.model, adapter.name)]
        self.model.adapters.add(self.model, adapter)
        try:
            add_inversions(self.model, inversions)
        except CheckpointError:
            self.model.adapters.remove(self.model, adapter.name)
            raise
        return adapter.name

    @usual_torch_state()
    def set_lora_scale(self, name: str, scale: float) -> None:
        """Set the scale of a loaded LoRA.

        Raises:
            SamplingError: no LoRA has this name, or the scale is not a finite number.
        """
        self.model.adapters.set_scale(self.model, name, scale)

    @usual_torch_state()
    def unload_lora(self, name: str | None = None) -> None:
        """Unload one LoRA, or all, with their textual inversions; the weights are restored bit for bit.

        Raises:
            SamplingError: no LoRA has this name.
        """
        self.model.adapters.remove(self.model, name)
        remove_inversions(self.model, lambda each: each.adapter is not None and name in (None, each.adapter))
