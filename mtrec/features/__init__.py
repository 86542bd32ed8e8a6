"""Features: Arrow columns -> rows of embedding tables and numbers. Kinds, the streaming fit, the encoder."""

from mtrec.features.arrays import BadRowsError
from mtrec.features.bucketized import Bucketized
from mtrec.features.categorical import Categorical
from mtrec.features.dense import Dense
from mtrec.features.encoded import Encoded, EncodedRows, join
from mtrec.features.encoder import Encoder
from mtrec.features.kinds import FEATURES
from mtrec.features.profile import FeatureCounts, FeatureProfile, psi
from mtrec.features.tables import Feature, Table, check_schema, id_columns
from mtrec.features.vocabulary import FIRST_ROW, NULL_ROW, UNSEEN_ROW

__all__ = [
    "FEATURES",
    "FIRST_ROW",
    "NULL_ROW",
    "UNSEEN_ROW",
    "BadRowsError",
    "Bucketized",
    "Categorical",
    "Dense",
    "Encoded",
    "EncodedRows",
    "Encoder",
    "Feature",
    "FeatureCounts",
    "FeatureProfile",
    "Table",
    "check_schema",
    "id_columns",
    "join",
    "psi",
]
