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

# A short schema can take minutes to compile, and xgrammar knows no limit. Copies of three of its files therefore call
# xgrammar::CountWork (src/grammar/work.h) where they work: for each state of the parser, for the tokens that are tried at each
# of the grammar, and for what each parser begins with.
# Compiles `text` in place of a file.
function(compile_instead file text)
  set(copy ${CMAKE_BINARY_DIR}/xgrammar/${file})
  file(WRITE ${copy}.new "${text}")
  configure_file(${copy}.new ${copy} COPYONLY)
  list(REMOVE_ITEM xgrammar_sources ${SPOT_XGRAMMAR}/cpp/${file})
  set(xgrammar_sources ${xgrammar_sources} ${copy} PARENT_SCOPE)
endfunction()
function(count_work file)
  file(READ ${SPOT_XGRAMMAR}/cpp/${file} text)
  list(LENGTH ARGN left)
  while(left GREATER 0)
    list(POP_FRONT ARGN line work)
    string(FIND "${text}" "${line}" found)
    if(found EQUAL -1)
      message(FATAL_ERROR "SPOT_XGRAMMAR=${SPOT_XGRAMMAR}: cpp/${file} holds no '${line}'; give the sources of the release that "
                          "cmake/xgrammar.lock names")
    endif()
    string(REPLACE "${line}" "(CountWork(${work}), ${line})" text "${text}")
    list(LENGTH ARGN left)
  endwhile()
  string(REPLACE "\nnamespace xgrammar {\n" "\nnamespace xgrammar {\nvoid CountWork(int64_t steps);\n" text "${text}")
  compile_instead(${file} "${text}")
  set(xgrammar_sources ${xgrammar_sources} PARENT_SCOPE)
endfunction()
count_work(earley_parser.cc "tmp_process_state_queue_.pop()" 16 "Scan(state, ch)" 16 "ref_id != state.rule_id" 1
           "grammar_->allow_empty_rule_ids" "4 * grammar_->NumRules()" "flags_cache.resize(fsm.NumStates())" "fsm.NumStates() / 16")
count_work(grammar_compiler.cc "grammar_matcher.GetAdaptiveTokenMask(is_root_rule)" "tokenizer_info_.GetVocabSize() / 4"
           "tmp_accepted_indices_.reserve(possible_token_num)" "8 * possible_token_num")
count_work(grammar_matcher.cc "PushOneStateToCheck(state)" "sorted_decoded_vocab.size() / 64")

# Its strings hold \uD800 and the like alone, which is no character and which strict parsers of JSON refuse: of surrogates, pairs
# alone are let pass.
file(READ ${SPOT_XGRAMMAR}/cpp/json_schema_converter.cc converter)
string(REGEX REPLACE "int32_t unicode_escape = Sequence\\([^;]*;"
[[const auto unicode = [&](const char* begin, std::vector<int32_t> digits) {
    digits.insert(digits.begin(), ByteString(begin));
    return Sequence(digits);
  };
  const int32_t any = hexadecimal_character;
  const int32_t d = builder_.AddCharacterClass({{'D', 'D'}, {'d', 'd'}});
  const int32_t not_d = builder_.AddCharacterClass({{'A', 'C'}, {'E', 'F'}, {'a', 'c'}, {'e', 'f'}, {'0', '9'}});
  const int32_t below = builder_.AddCharacterClass({{'0', '7'}});
  const int32_t high = builder_.AddCharacterClass({{'8', '9'}, {'A', 'B'}, {'a', 'b'}});
  const int32_t low = builder_.AddCharacterClass({{'C', 'F'}, {'c', 'f'}});
  const int32_t pair = Sequence({unicode("u", {d, high, any, any}), unicode("\\\\u", {d, low, any, any})});
  const int32_t unicode_escape = Choice({unicode("u", {not_d, any, any, any}), unicode("u", {d, below, any, any}), pair});]]
       changed "${converter}")
if(changed STREQUAL converter)
  message(FATAL_ERROR "SPOT_XGRAMMAR=${SPOT_XGRAMMAR}: cpp/json_schema_converter.cc holds no 'unicode_escape'; give the sources of the "
                      "release that cmake/xgrammar.lock names")
endif()
compile_instead(json_schema_converter.cc "${changed}")
add_library(xgrammar STATIC ${xgrammar_sources})
set_target_properties(xgrammar PROPERTIES CXX_STANDARD 17 UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 8)
target_include_directories(xgrammar SYSTEM PUBLIC ${SPOT_XGRAMMAR}/include ${SPOT_XGRAMMAR}/3rdparty/dlpack/include
                                           PRIVATE ${SPOT_XGRAMMAR}/cpp ${SPOT_XGRAMMAR}/3rdparty/picojson)
# Its messages come to us: what it only warns of would be a schema that is kept in part (src/grammar).
target_compile_definitions(xgrammar PRIVATE XGRAMMAR_LOG_CUSTOMIZE=1 XGRAMMAR_ENABLE_CPPTRACE=0 XGRAMMAR_ENABLE_INTERNAL_CHECK=0)
target_compile_options(xgrammar PRIVATE -w)
