# xgrammar (Apache-2.0): the C++ core that turns a JSON schema into the tokens that an answer may have next, from the sources of
# its Python package (scripts/setup.sh brings them, cmake/xgrammar.lock says which). It brings picojson (BSD-2-Clause) and
# dlpack's header (Apache-2.0). Without them everything is built but JSON-schema output.
set(xgrammar_default ${CMAKE_SOURCE_DIR}/.venv/src/xgrammar-0.2.8)
if(NOT EXISTS ${xgrammar_default})
  set(xgrammar_default "")
endif()
set(SPOT_XGRAMMAR "${xgrammar_default}" CACHE STRING "Folder of xgrammar's sources, for JSON-schema output; empty: without")
if(NOT SPOT_XGRAMMAR)
  message(STATUS "xgrammar's sources were not found: no JSON-schema output (scripts/setup.sh brings them)")
  return()
endif()
if(NOT EXISTS ${SPOT_XGRAMMAR}/cpp/grammar_compiler.cc)
  message(FATAL_ERROR "SPOT_XGRAMMAR=${SPOT_XGRAMMAR} holds no sources of xgrammar (cpp/grammar_compiler.cc); give the unpacked "
                      "folder of its source package, or nothing")
endif()
file(GLOB xgrammar_sources ${SPOT_XGRAMMAR}/cpp/*.cc ${SPOT_XGRAMMAR}/cpp/support/*.cc ${SPOT_XGRAMMAR}/cpp/converter_ext/*.cc)
add_library(xgrammar STATIC ${xgrammar_sources})
set_target_properties(xgrammar PROPERTIES CXX_STANDARD 17)
target_include_directories(xgrammar SYSTEM PUBLIC ${SPOT_XGRAMMAR}/include ${SPOT_XGRAMMAR}/3rdparty/dlpack/include
                                           PRIVATE ${SPOT_XGRAMMAR}/3rdparty/picojson)
# Its messages come to us: what it only warns of would be a schema that is kept in part (src/grammar).
target_compile_definitions(xgrammar PRIVATE XGRAMMAR_LOG_CUSTOMIZE=1 XGRAMMAR_ENABLE_CPPTRACE=0 XGRAMMAR_ENABLE_INTERNAL_CHECK=0)
target_compile_options(xgrammar PRIVATE -w)
