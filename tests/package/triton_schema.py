"""The part of Triton's model_config.proto that our files use, so that protobuf itself parses and checks them.

Names, numbers and types are Triton's; `test_the_schema_is_tritons_own` compares them where tritonclient is.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

__all__ = ["MESSAGES", "parse_config", "schema"]

_STRING, _INT32, _INT64, _BOOL, _ENUM, _MESSAGE = 9, 5, 3, 8, 14, 11
_TYPES = (
    *("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "STRING", "BF16"),
)
_KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
# message -> {field: (number, type, repeated, type name)}
MESSAGES = {
    "ModelInput": {
        "name": (1, _STRING, False, ""),
        "data_type": (2, _ENUM, False, "DataType"),
        "dims": (4, _INT64, True, ""),
        "optional": (8, _BOOL, False, ""),
    },
    "ModelOutput": {
        "name": (1, _STRING, False, ""),
        "data_type": (2, _ENUM, False, "DataType"),
        "dims": (3, _INT64, True, ""),
    },
    "ModelInstanceGroup": {
        "kind": (4, _ENUM, False, "ModelInstanceGroup.Kind"),
        "count": (2, _INT32, False, ""),
    },
    "ModelParameter": {"string_value": (1, _STRING, False, "")},
    "ModelTransactionPolicy": {"decoupled": (1, _BOOL, False, "")},
    "ModelConfig": {
        "name": (1, _STRING, False, ""),
        "backend": (17, _STRING, False, ""),
        "max_batch_size": (4, _INT32, False, ""),
        "input": (5, _MESSAGE, True, "ModelInput"),
        "output": (6, _MESSAGE, True, "ModelOutput"),
        "instance_group": (7, _MESSAGE, True, "ModelInstanceGroup"),
        "model_transaction_policy": (19, _MESSAGE, False, "ModelTransactionPolicy"),
    },
}


def schema():
    """The class of ModelConfig messages."""
    file = descriptor_pb2.FileDescriptorProto(
        name="triton_subset.proto", package="triton_subset", syntax="proto3"
    )
    _enum(file.enum_type.add(), "DataType", [f"TYPE_{name}" for name in _TYPES])
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated, type_name) in fields.items():
            added = message.field.add(name=field, number=number, type=kind, label=3 if repeated else 1)
            if type_name:
                added.type_name = f".triton_subset.{type_name}"
        if name == "ModelInstanceGroup":
            _enum(message.enum_type.add(), "Kind", _KINDS)
    config = file.message_type[-1]
    entry = config.nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_STRING, label=1)
    entry.field.add(name="value", number=2, type=_MESSAGE, label=1, type_name=".triton_subset.ModelParameter")
    config.field.add(
        name="parameters",
        number=14,
        type=_MESSAGE,
        label=3,
        type_name=".triton_subset.ModelConfig.ParametersEntry",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton_subset.ModelConfig"))


def parse_config(text: str):
    """A config.pbtxt as protobuf parses it: unknown fields and wrong types are errors."""
    return text_format.Parse(text, schema()())


def _enum(enum, name, values):
    enum.name = name
    for number, value in enumerate(values):
        enum.value.add(name=value, number=number)
