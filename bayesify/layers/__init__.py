"""Rank-1 equivalents of linear, convolutional and recurrent layers. Importing this fills the registry."""

from bayesify.layers import attention, conv, experts, linear, lookup, recurrent
from bayesify.layers.attention import FUSED as FUSED
from bayesify.layers.attention import OUT_BATCH_DIM as OUT_BATCH_DIM
from bayesify.layers.attention import Unfused as Unfused
from bayesify.layers.functional import Rank1Functional as Rank1Functional
from bayesify.layers.functional import attach_functional as attach_functional
from bayesify.layers.functional import functional_sizes as functional_sizes
from bayesify.layers.functional import watched_products as watched_products
from bayesify.layers.gathered import Gathering as Gathering
from bayesify.layers.gathered import hands_tokens_on as hands_tokens_on
from bayesify.layers.inference import PackedConv2d as PackedConv2d
from bayesify.layers.inference import PackedLinear as PackedLinear
from bayesify.layers.inference import PackedLSTM as PackedLSTM
from bayesify.layers.inference import speed_up as speed_up
from bayesify.layers.members import MemberVector as MemberVector
from bayesify.layers.norm import MemberBatchNorm as MemberBatchNorm
from bayesify.layers.norm import MemberNorm as MemberNorm
from bayesify.layers.norm import attach_norm as attach_norm
from bayesify.layers.registry import Derived as Derived
from bayesify.layers.registry import Rank1Layer as Rank1Layer
from bayesify.layers.registry import Rewritten as Rewritten
from bayesify.layers.registry import attach as attach
from bayesify.layers.registry import bias_of as bias_of
from bayesify.layers.registry import detach as detach
from bayesify.layers.registry import is_exact as is_exact
from bayesify.layers.registry import is_linear as is_linear
from bayesify.layers.registry import original_class as original_class
from bayesify.layers.registry import rank1 as rank1
from bayesify.layers.registry import rank1_class as rank1_class
from bayesify.layers.registry import weight_sizes as weight_sizes
from bayesify.layers.registry import wrap as wrap
from bayesify.layers.site import AdditiveSite as AdditiveSite
from bayesify.layers.site import Site as Site
