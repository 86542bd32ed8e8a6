"""The kinds of features that a YAML file may name. A new kind is a module beside this one and an entry here."""

from mtrec.features.bucketized import Bucketized
from mtrec.features.categorical import Categorical
from mtrec.features.dense import Dense
from mtrec.kinds import Kinds

FEATURES = Kinds({"categorical": Categorical, "dense": Dense, "bucketized": Bucketized}, ("family", "check_type"))
