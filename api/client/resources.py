"""Datasets, checkpoints and presets: every call once, for both clients (api.client.calls)."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from api.client.calls import W, call, each
from api.client.files import Report, as_file, counted, download, sendable, unpack
from api.client.objects import Checkpoint, Dataset, Preset
from api.client.transport import Part, path_of

INTAKE_SECONDS = 600  # the service decodes all images of an upload before it answers


class Datasets(Part[W]):
    @call
    async def upload(
        self, source: Path, progress: Report | None = None, *, test_as_validation: bool = False
    ) -> Dataset:
        """Uploads an archive of images, an .npy or .npz file, an image, or a folder of images (as a zip).

        With `test_as_validation`, the images that are named as test images are the validation part. Without it no
        training uses them. If the service has a dataset of the same owner with the same images, it returns that one.
        """
        with ExitStack() as opened:
            name, file = await self.way.run(partial(opened.enter_context, as_file(source)))
            files = [("file", (name, counted(file, progress)))]
            data = {"test_as_validation": "true"} if test_as_validation else {}
            return await self._transport.create(Dataset, "/v1/datasets", data=data, files=files, timeout=INTAKE_SECONDS)

    @call
    async def get(self, dataset_id: str) -> Dataset:
        return await self._transport.get(Dataset, path_of("datasets", dataset_id))

    @call
    async def contact_sheet(self, dataset_id: str) -> bytes:
        """A PNG of up to 64 of its images."""
        return (await self._transport.request("GET", path_of("datasets", dataset_id, "contact-sheet"))).content

    @each
    def list(self) -> AsyncIterator[Dataset]:
        """Newest first."""
        return self._transport.pages(Dataset, "/v1/datasets", {})

    @call
    async def delete(self, dataset_id: str) -> None:
        await self._transport.request("DELETE", path_of("datasets", dataset_id))


class Checkpoints(Part[W]):
    @call
    async def get(self, checkpoint_id: str) -> Checkpoint:
        return await self._transport.get(Checkpoint, path_of("checkpoints", checkpoint_id))

    @each
    def list(self, job: str | None = None) -> AsyncIterator[Checkpoint]:
        """Newest first: all, or those of a training job."""
        return self._transport.pages(Checkpoint, "/v1/checkpoints", {"job": job})

    @call
    async def upload(self, source: Path, preset: str, progress: Report | None = None) -> Checkpoint:
        """Imports the authors' .npz file of a preset's weights."""
        with source.open("rb") as file:
            files = [("file", (sendable(source.name), counted(file, progress)))]
            return await self._transport.create(
                Checkpoint, "/v1/checkpoints", data={"preset": preset}, files=files, timeout=INTAKE_SECONDS
            )

    @call
    async def download(self, checkpoint_id: str, target: Path, progress: Report | None = None) -> Path:
        """Downloads the checkpoint as a zip to the file `target`, and continues an earlier download."""
        return await download(self._transport, path_of("checkpoints", checkpoint_id, "download"), target, progress)

    @call
    async def fetch(self, checkpoint_id: str, directory: Path, progress: Report | None = None) -> Path:
        """Downloads the checkpoint to the new `directory`, which `flowpp.FlowPP.load` reads.

        Raises `FileExistsError` and `DamagedDownload`.
        """
        if directory.exists():
            raise FileExistsError(f"{directory} exists already; a checkpoint is unpacked into a new directory")
        archive = directory.with_name(f"{directory.name}.zip")
        await download(self._transport, path_of("checkpoints", checkpoint_id, "download"), archive, progress)
        try:
            await self.way.run(partial(unpack, archive, directory))
        finally:
            archive.unlink()
        return directory

    @call
    async def delete(self, checkpoint_id: str) -> None:
        await self._transport.request("DELETE", path_of("checkpoints", checkpoint_id))


class Presets(Part[W]):
    @each
    def list(self) -> AsyncIterator[Preset]:
        return self._transport.pages(Preset, "/v1/presets", {})
