/* The nine functions that TensorRT's Python bindings import from TensorRT's libraries. Each calls its hook, which the
 * simulation sets; without one it returns nothing, which is enough for `import tensorrt`. */
#include <stddef.h>
#include <stdint.h>

#define FUNCTION(result, name, parameters, arguments, without)                                                        \
    result(*hook_##name) parameters;                                                                                   \
    result name parameters { return hook_##name ? hook_##name arguments : (without); }

typedef void *object;

FUNCTION(object, createInferBuilder_INTERNAL, (object logger, int32_t version), (logger, version), NULL)
FUNCTION(object, createInferRuntime_INTERNAL, (object logger, int32_t version), (logger, version), NULL)
FUNCTION(object, createInferRefitter_INTERNAL, (object engine, object logger, int32_t version),
         (engine, logger, version), NULL)
FUNCTION(object, getPluginRegistry, (void), (), NULL)
FUNCTION(object, getBuilderPluginRegistry, (int32_t capability), (capability), NULL)
FUNCTION(uint8_t, initLibNvInferPlugins, (object logger, const char *scope), (logger, scope), 1)
FUNCTION(object, createNvOnnxParser_INTERNAL, (object network, object logger, int32_t version),
         (network, logger, version), NULL)
FUNCTION(object, createNvOnnxParserRefitter_INTERNAL, (object refitter, object logger, int32_t version),
         (refitter, logger, version), NULL)
FUNCTION(int32_t, getNvOnnxParserVersion, (void), (), 0)
