"""Load base models; save, load and upload Bayesian ones."""

from bayesify.hub.base import Base as Base
from bayesify.hub.base import load_base as load_base
from bayesify.hub.base import save_timm_folder as save_timm_folder
from bayesify.hub.load import from_pretrained as from_pretrained
from bayesify.hub.load import load_bayesian as load_bayesian
from bayesify.hub.load import load_model as load_model
from bayesify.hub.load import read_config as read_config
from bayesify.hub.origin import Origin as Origin
from bayesify.hub.origin import origin_of as origin_of
from bayesify.hub.push import push_folder as push_folder
from bayesify.hub.push import push_to_hub as push_to_hub
from bayesify.hub.save import save_pretrained as save_pretrained
