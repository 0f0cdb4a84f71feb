from tests.registry.stores.conftest import (
    docker_registry,
    docker_registry_store,
    folder_store,
    impatient,
    memory_oci,
    memory_oci_store,
    memory_oci_without_referrers_store,
    memory_s3,
    memory_s3_store,
    seaweed,
    seaweed_store,
)

__all__ = [
    "docker_registry",
    "docker_registry_store",
    "folder_store",
    "impatient",
    "memory_oci",
    "memory_oci_store",
    "memory_oci_without_referrers_store",
    "memory_s3",
    "memory_s3_store",
    "seaweed",
    "seaweed_store",
]
