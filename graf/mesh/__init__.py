"""Objects of a trained run as things: meshes with colours, point clouds, and their files; no cameras of photographs.

Meshes are in world units with z up; what a file's format wants instead is done when it is written.
"""

from graf.mesh.coloured_mesh import ColouredMesh
from graf.mesh.formats import MESH_SUFFIXES, save_mesh
from graf.mesh.objects import MeshOptions, extract_mesh

__all__ = ["MESH_SUFFIXES", "ColouredMesh", "MeshOptions", "extract_mesh", "save_mesh"]
