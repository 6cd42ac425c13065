/* virtio-mmio (version 2) as its drivers see it: registers and rings. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "guest.h"

#define VIRTIO_MAGIC 0x74726976u
#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define FEATURE_VERSION_1 (1u << 0) /* bit 32, in the upper word */
#define FEATURE_EVENT_INDEX (1u << 29)
#define DESCRIPTOR_NEXT 1
#define DESCRIPTOR_WRITE 2
#define INTERRUPT_CONFIG 2u

enum registers { /* byte offset / 4 */
    R_MAGIC = 0x00 / 4, R_VERSION = 0x04 / 4, R_DEVICE = 0x08 / 4,
    R_FEATURES = 0x10 / 4, R_FEATURES_SELECT = 0x14 / 4,
    R_DRIVER_FEATURES = 0x20 / 4, R_DRIVER_FEATURES_SELECT = 0x24 / 4,
    R_QUEUE_SELECT = 0x30 / 4, R_QUEUE_MAX = 0x34 / 4, R_QUEUE_SIZE = 0x38 / 4, R_QUEUE_READY = 0x44 / 4,
    R_NOTIFY = 0x50 / 4, R_INTERRUPT = 0x60 / 4, R_INTERRUPT_ACK = 0x64 / 4, R_STATUS = 0x70 / 4,
    R_DESCRIPTORS = 0x80 / 4, R_AVAIL = 0x90 / 4, R_USED = 0xa0 / 4, R_GENERATION = 0xfc / 4, R_CONFIG = 0x100 / 4,
};
struct descriptor {
    u64 address;
    u32 bytes;
    u16 flags, next;
};
struct avail_ring {
    u16 flags, index, ring[];
};
struct used_ring {
    u16 flags, index;
    struct {
        u32 id, bytes;
    } ring[];
};

#endif
