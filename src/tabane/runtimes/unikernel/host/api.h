/* What the host uses of libwasmtime's C interface, looked up in the library at run time, so that
 * neither its headers nor the library are needed to compile the host. Layouts and prototypes are those
 * of wasmtime.h; a library that lays them out otherwise does not pass the driver's trial. */

#ifndef TABANE_HOST_API_H
#define TABANE_HOST_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    size_t size;
    char *data;
} bytes_t;

typedef struct {
    size_t size;
    void **data;
} types_t;

typedef struct {
    uint64_t store;
    void *where;
} func_t;

typedef struct {
    uint64_t store;
    size_t where;
} instance_t;

typedef struct {
    struct {
        uint64_t store;
        uint32_t where;
    } first;
    uint32_t second;
} memory_t;

enum { EXTERN_FUNC = 0, EXTERN_MEMORY = 3 };

typedef struct {
    uint8_t kind;
    union {
        func_t func;
        memory_t memory;
        uint64_t room[3];
    } of;
} extern_t;

enum { KIND_I32 = 0, KIND_I64 = 1 };

typedef struct {
    uint8_t kind;
    union {
        int32_t i32;
        int64_t i64;
        uint64_t room[3];
    } of;
} val_t;

_Static_assert(sizeof(extern_t) == 32 && sizeof(val_t) == 32 && sizeof(memory_t) == 24, "wasmtime.h");

typedef void *(*callback_t)(void *env, void *caller, const val_t *args, size_t nargs, val_t *results,
                            size_t nresults);
typedef void *(*epoch_t)(void *context, void *data, uint64_t *delta, uint8_t *kind);

/* Each: result, name, arguments. `own` pointers of the original are plain ones here. */
#define API(F)                                                                                     \
    F(void *, wasm_config_new, (void))                                                             \
    F(void, wasmtime_config_epoch_interruption_set, (void *, bool))                                \
    F(void, wasmtime_config_parallel_compilation_set, (void *, bool))                              \
    F(void, wasmtime_config_memory_init_cow_set, (void *, bool))                                   \
    F(void *, wasmtime_pooling_allocation_config_new, (void))                                      \
    F(void, wasmtime_pooling_allocation_config_total_core_instances_set, (void *, uint32_t))       \
    F(void, wasmtime_pooling_allocation_config_total_memories_set, (void *, uint32_t))             \
    F(void, wasmtime_pooling_allocation_config_total_tables_set, (void *, uint32_t))               \
    F(void, wasmtime_pooling_allocation_config_total_stacks_set, (void *, uint32_t))               \
    F(void, wasmtime_pooling_allocation_config_total_gc_heaps_set, (void *, uint32_t))             \
    F(void, wasmtime_pooling_allocation_config_max_tables_per_module_set, (void *, uint32_t))      \
    F(void, wasmtime_pooling_allocation_config_table_elements_set, (void *, size_t))               \
    F(void, wasmtime_pooling_allocation_config_max_memory_size_set, (void *, size_t))              \
    F(void, wasmtime_pooling_allocation_config_max_core_instance_size_set, (void *, size_t))       \
    F(void, wasmtime_pooling_allocation_config_linear_memory_keep_resident_set, (void *, size_t))  \
    F(void, wasmtime_pooling_allocation_strategy_set, (void *, const void *))                      \
    F(void *, wasm_engine_new_with_config, (void *))                                               \
    F(void, wasmtime_engine_increment_epoch, (void *))                                             \
    F(void *, wasmtime_module_new, (void *, const uint8_t *, size_t, void **))                     \
    F(void *, wasmtime_module_serialize, (void *, bytes_t *))                                      \
    F(void *, wasmtime_module_deserialize_file, (void *, const char *, void **))                   \
    F(void *, wasmtime_linker_new, (void *))                                                       \
    F(void *, wasmtime_linker_define_func,                                                         \
      (void *, const char *, size_t, const char *, size_t, const void *, callback_t, void *,       \
       void (*)(void *)))                                                                          \
    F(void *, wasmtime_linker_instantiate_pre, (void *, void *, void **))                          \
    F(void *, wasmtime_instance_pre_instantiate, (void *, void *, instance_t *, void **))          \
    F(void *, wasm_valtype_new, (uint8_t))                                                         \
    F(void, wasm_valtype_vec_new, (types_t *, size_t, void **))                                    \
    F(void *, wasm_functype_new, (types_t *, types_t *))                                           \
    F(void *, wasmtime_store_new, (void *, void *, void (*)(void *)))                              \
    F(void, wasmtime_store_delete, (void *))                                                       \
    F(void *, wasmtime_store_context, (void *))                                                    \
    F(void, wasmtime_store_epoch_deadline_callback, (void *, epoch_t, void *, void (*)(void *)))   \
    F(void, wasmtime_context_set_epoch_deadline, (void *, uint64_t))                               \
    F(void *, wasmtime_context_get_data, (void *))                                                 \
    F(void *, wasmtime_caller_context, (void *))                                                   \
    F(bool, wasmtime_caller_export_get, (void *, const char *, size_t, extern_t *))                \
    F(bool, wasmtime_instance_export_get, (void *, instance_t *, const char *, size_t, extern_t *)) \
    F(uint8_t *, wasmtime_memory_data, (void *, const memory_t *))                                 \
    F(size_t, wasmtime_memory_data_size, (void *, const memory_t *))                               \
    F(void *, wasmtime_func_call,                                                                  \
      (void *, const func_t *, const val_t *, size_t, val_t *, size_t, void **))                   \
    F(void *, wasmtime_trap_new, (const char *, size_t))                                           \
    F(void, wasm_trap_message, (void *, bytes_t *))                                                \
    F(void, wasm_trap_delete, (void *))                                                            \
    F(void *, wasmtime_error_new, (const char *))                                                  \
    F(void, wasmtime_error_message, (void *, bytes_t *))                                           \
    F(void, wasmtime_error_delete, (void *))                                                       \
    F(void, wasm_byte_vec_delete, (bytes_t *))

struct api {
#define API_FIELD(result, name, arguments) result(*name) arguments;
    API(API_FIELD)
#undef API_FIELD
};

extern struct api api;

#endif
