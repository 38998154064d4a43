"""The process in which pycolmap works: `python -m graf.capture.colmap_worker FOLDER`, started by walkaround.py.

A C++ library that aborts, hangs or eats memory ends this process and not the program that asked. FOLDER holds job.json
(`Job`), images/ and perhaps masks/; the answer is result.json. Standard input is held open by the program that asked,
standard output has a line for each stage, standard error the library's own words. COLMAP: Schönberger & Frahm,
"Structure-from-motion revisited" (CVPR 2016).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graf.base.extras import import_optional

TEMPORARY = "graf_walkaround_"  # how the names of the folders begin that this program makes for a worker
JOB_FILE, RESULT_FILE, IMAGES, MASKS = "job.json", "result.json", "images", "masks"
CAMERA_MODEL = "SIMPLE_RADIAL"  # focal length, centre, one coefficient of distortion: as much as phones need
MAX_FEATURES = 3000  # of an image; matching costs their square
MAX_SIDE = 1280  # pixels in which features are looked for
STILL_PIXELS = 0.004  # of the longer side: a point that moves less between two pictures stands still
BLOCK = 10  # photographs compared with as many others between two signs of progress
SMALLEST_MODEL = 5
MAX_POINTS = 4000
OVERLAP = 10  # frames to either side that a frame of a video is compared with, and in powers of two beyond


@dataclass(frozen=True)
class Job:
    """What to do. sequential: compare a frame with its neighbours instead of with all; use_masks: features on the
    object alone; focal_factor: focal length to begin with, in longer sides of the picture.
    """

    names: list[str]
    sequential: bool
    use_masks: bool
    focal_factor: float
    threads: int
    seed: int


def end_with_parent(folder: Path) -> None:
    """End this process, and remove its temporary folder, when the program that started it is gone.

    However that ended, and be it before this process looks, the system then closes the other end of standard input.
    """
    while os.read(0, 1):
        pass
    if folder.name.startswith(TEMPORARY):  # and is not one that somebody has named by hand
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Work on the folder named; the exit code is 0 also where nothing could be reconstructed."""
    folder = Path(arguments[0])
    threading.Thread(target=end_with_parent, args=(folder,), daemon=True).start()
    job = Job(**json.loads((folder / JOB_FILE).read_text(encoding="utf-8")))
    pycolmap = import_optional("pycolmap", "capture")
    pycolmap.set_random_seed(job.seed)
    pycolmap.logging.logtostderr = True
    database = folder / "database.db"

    announce("features", len(job.names))
    extract_features(pycolmap, folder, database, job)
    announce("matches", len(job.names))
    match_features(pycolmap, database, job)
    result = measure_matches(pycolmap, database)
    announce("cameras", len(job.names))
    result["models"] = map_incrementally(pycolmap, folder, database, job)
    (folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
    return 0


def announce(stage: str, total: int) -> None:
    """Tell the program that waits what comes now, and of how many images."""
    print(f"stage {stage} {total}", flush=True)


def extract_features(pycolmap: Any, folder: Path, database: Path, job: Job) -> None:
    """SIFT features of all images, which share one camera, into the database."""
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = CAMERA_MODEL
    reader.default_focal_length_factor = job.focal_factor
    if job.use_masks:
        reader.mask_path = folder / MASKS  # of images/a.png that is masks/a.png.png; what is black there is ignored
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.num_threads, extraction.use_gpu = job.threads, False
    extraction.max_image_size = MAX_SIDE
    extraction.sift.max_num_features = MAX_FEATURES
    pycolmap.extract_features(
        database,
        folder / IMAGES,
        image_names=job.names,
        camera_mode=pycolmap.CameraMode.SINGLE,
        reader_options=reader,
        extraction_options=extraction,
        device=pycolmap.Device.cpu,
    )


def match_features(pycolmap: Any, database: Path, job: Job) -> None:
    """Pairs of images that see the same, with the geometry that relates them."""
    matching = pycolmap.FeatureMatchingOptions()
    matching.num_threads, matching.use_gpu = job.threads, False
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = job.seed
    options: dict[str, Any] = {"matching_options": matching, "verification_options": verification}
    options["device"] = pycolmap.Device.cpu
    if job.sequential:
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap, pairing.quadratic_overlap, pairing.loop_detection = OVERLAP, True, False
        pycolmap.match_sequential(database, pairing_options=pairing, **options)
    else:
        pairing = pycolmap.ExhaustivePairingOptions()
        pairing.block_size = BLOCK
        pycolmap.match_exhaustive(database, pairing_options=pairing, **options)


def measure_matches(pycolmap: Any, database: Path) -> dict[str, Any]:
    """Numbers of features per image, and the share of verified matches that lie at the same place in both pictures."""
    opened = pycolmap.Database.open(database)
    images = opened.read_all_images()
    features = {image.name: int(opened.num_keypoints_for_image(image.image_id)) for image in images}
    keypoints = {image.image_id: np.asarray(opened.read_keypoints(image.image_id))[:, :2] for image in images}
    cameras = opened.read_all_cameras()
    still_pixels = STILL_PIXELS * max(max(camera.width, camera.height) for camera in cameras)
    matches = still = 0
    pair_ids, geometries = opened.read_two_view_geometries()
    for pair_id, geometry in zip(pair_ids, geometries, strict=True):
        first, second = pycolmap.pair_id_to_image_pair(pair_id)
        pairs = np.asarray(geometry.inlier_matches).astype(np.int64).reshape(-1, 2)
        moved = keypoints[first][pairs[:, 0]] - keypoints[second][pairs[:, 1]]
        matches += len(pairs)
        still += int((np.linalg.norm(moved, axis=1) < still_pixels).sum())
    opened.close()
    return {"features": features, "pairs": len(pair_ids), "matches": matches, "still": still}


def map_incrementally(pycolmap: Any, folder: Path, database: Path, job: Job) -> list[dict[str, Any]]:
    """Reconstructions, the one of most images first: camera, camera-from-world 3 x 4 by name, error, points."""
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads = options.mapper.num_threads = 1  # sums of several threads differ from run to run
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = job.seed
    options.min_model_size = SMALLEST_MODEL
    options.extract_colors = False
    output = folder / "models"
    output.mkdir(exist_ok=True)
    models = pycolmap.incremental_mapping(
        database,
        folder / IMAGES,
        output,
        options=options,
        next_image_callback=lambda: print("next", flush=True),
    )
    found = [describe_model(model) for model in models.values()]
    return sorted(found, key=lambda model: (-len(model["poses"]), model["error"]))


def describe_model(model: Any) -> dict[str, Any]:
    """A reconstruction in plain numbers."""
    images = [model.images[image_id] for image_id in model.reg_image_ids()]
    camera = next(iter(model.cameras.values()))
    focal, centre_x, centre_y, radial = (float(value) for value in camera.params)
    return {
        "camera": {
            "width": int(camera.width),
            "height": int(camera.height),
            "focal": focal,
            "centre": [centre_x, centre_y],
            "radial": radial,
        },
        "poses": {image.name: np.asarray(image.cam_from_world().matrix()).tolist() for image in images},
        "error": float(model.compute_mean_reprojection_error()),
        "points": int(model.num_points3D()),
        "some_points": describe_points(model),
    }


def describe_points(model: Any) -> list[list[float]]:
    """Up to MAX_POINTS places in space, evenly chosen, of what was seen in three photographs or more."""
    places = [point.xyz.tolist() for _, point in sorted(model.points3D.items()) if point.track.length() >= 3]
    return places[:: max(1, -(-len(places) // MAX_POINTS))]


def write_job(folder: Path, job: Job) -> None:
    """Leave a job in the folder that a worker is started on."""
    (folder / JOB_FILE).write_text(json.dumps(asdict(job)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
