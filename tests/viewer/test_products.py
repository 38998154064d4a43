"""Files of the viewer: a video's frames are those that `graf eval --path` renders of the path that is saved with it."""

import numpy as np
import torch

from graf.evaluation.camera_paths import path_from_json, path_to_json, render_path
from graf.geometry.cameras import pose_from_angles
from graf.viewer import products
from graf.viewer.products import path_video
from graf.viewer.session import Session
from graf.viewer.viewpoints import Viewpoint, viser_rotation


def test_a_saved_path_is_replayed_to_the_last_pixel(renderer, monkeypatch):
    frames, shares = [], []

    def keep(path, pictures, fps):
        frames.extend(pictures)
        path.write_bytes(b"video")
        return path

    monkeypatch.setattr(products, "write_video", keep)
    session = Session(renderer)
    for u, class_name in ((0.1, "car"), (0.35, "duck"), (0.7, "mug")):
        pose = pose_from_angles(torch.tensor(u), torch.tensor(0.3), 3.1)
        session.choose_class(class_name)
        session.draw_part("shape")
        session.add_keyframe(Viewpoint.from_viser(viser_rotation(pose), pose[:3, 3].tolist(), 0.51, 4 / 3))
    path = session.path(0.5, True, round(4 / 3, 3))
    assert path_video(renderer, path, session.look, 18, 6, shares.append) == {"camera_path.mp4": b"video"}
    assert shares == [number / 9 for number in range(9)]
    replayed = list(render_path(renderer, path_from_json(path_to_json(path)), 18, 6))
    assert np.array_equal(frames, replayed)
    assert len({frame.tobytes() for frame in frames}) == 9
