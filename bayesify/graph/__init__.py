"""The graph rewriter: capture, find sites, swap, audit. Each pass is a file."""

from bayesify.graph.audit import audit as audit
from bayesify.graph.calls import measure_work as measure_work
from bayesify.graph.calls import record_calls as record_calls
from bayesify.graph.inputs import as_inputs as as_inputs
from bayesify.graph.inputs import derive_inputs as derive_inputs
from bayesify.graph.late import Cut as Cut
from bayesify.graph.late import Parting as Parting
from bayesify.graph.late import find_cut as find_cut
from bayesify.graph.layout import observe as observe
from bayesify.graph.layout import watched_outputs as watched_outputs
from bayesify.graph.norms import NormPairs as NormPairs
from bayesify.graph.norms import norm_pairs as norm_pairs
from bayesify.graph.plan import Plan as Plan
from bayesify.graph.plan import site_name as site_name
from bayesify.graph.report import ConversionReport as ConversionReport
from bayesify.graph.rewrite import report_on as report_on
from bayesify.graph.rewrite import restore as restore
from bayesify.graph.rewrite import swap as swap
from bayesify.graph.rewrite import take_out as take_out
from bayesify.graph.shapes import is_quantized as is_quantized
from bayesify.graph.shapes import on_shapes as on_shapes
from bayesify.graph.sites import find_sites as find_sites
from bayesify.graph.source import forward_names as forward_names
from bayesify.graph.stages import stages as stages
