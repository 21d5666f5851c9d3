"""Which layers: target scopes, the Linear layers of a model, the sites they share, their roles."""

from actsparse.scopes.layers import Layer as Layer
from actsparse.scopes.layers import Layers as Layers
from actsparse.scopes.layers import LayerSize as LayerSize
from actsparse.scopes.matching import match_targets as match_targets
from actsparse.scopes.sites import Site as Site
from actsparse.scopes.sites import group_sites as group_sites
from actsparse.scopes.target_scope import ROLES as ROLES
from actsparse.scopes.target_scope import TargetScope as TargetScope
