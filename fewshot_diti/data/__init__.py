"""Images, their sources, and the shots drawn from them."""

from fewshot_diti.data.arguments import as_images
from fewshot_diti.data.duplicates import near_duplicates, warn_of_near_duplicates
from fewshot_diti.data.folders import load_folder
from fewshot_diti.data.image_set import ImageSet, SplitError
from fewshot_diti.data.images import DecodedImage, ImageGeometry, ImageSource, ResizeRule, decode, image_id, open_image
from fewshot_diti.data.shots import (
    Shots,
    check_disjoint,
    sample_shots,
    sample_shots_of_one_value,
    seen_attribute,
    shown_attribute,
)
from fewshot_diti.data.sources import (
    load_bundled,
    load_fgvc,
    load_hub,
    load_images,
    load_manifest,
    normalize_airline,
)
from fewshot_diti.data.splits import import_path_list, load_shots_file

__all__ = [
    "DecodedImage",
    "ImageGeometry",
    "ImageSet",
    "ImageSource",
    "ResizeRule",
    "Shots",
    "SplitError",
    "as_images",
    "check_disjoint",
    "decode",
    "image_id",
    "import_path_list",
    "load_bundled",
    "load_fgvc",
    "load_folder",
    "load_hub",
    "load_images",
    "load_manifest",
    "load_shots_file",
    "near_duplicates",
    "normalize_airline",
    "open_image",
    "sample_shots",
    "sample_shots_of_one_value",
    "seen_attribute",
    "shown_attribute",
    "warn_of_near_duplicates",
]
