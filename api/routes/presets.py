"""Presets: named models with their recipes."""

from fastapi import APIRouter

from api.schemas import ListOf, Preset, as_list
from flowpp.presets import PRESETS
from worker.paging import Page

router = APIRouter(prefix="/presets", tags=["presets"])


@router.get("")
def list_presets() -> ListOf[Preset]:
    """List the presets, every field with its value. A dataset's image shape takes the place of theirs."""
    shown = [Preset(id=name, **dict(preset)) for name, preset in PRESETS.items()]
    return ListOf[Preset](**as_list(Page(shown, False)))
