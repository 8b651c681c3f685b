# The licences of what the wheel's libraries hold of others, as Debian and PyPI bring them: spotattention/licenses.
function(install_license name file)
  install(FILES ${file} DESTINATION spotattention/licenses COMPONENT python RENAME ${name})
endfunction()

foreach(package libfmt-dev libpcre2-dev libutf8proc-dev libzstd-dev zlib1g-dev libxxhash-dev nlohmann-json3-dev libcli11-dev
                libboost1.81-dev)
  set(file /usr/share/doc/${package}/copyright)
  if(EXISTS ${file})
    install_license(${package} ${file})
  else()
    message(WARNING "${file} does not exist: the wheel will not hold the licence of ${package}, and is not to be published so")
  endif()
endforeach()
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "from importlib.metadata import files; print(next(f.locate() for f in files('wonderwords') if f.name == 'LICENSE'))"
  OUTPUT_VARIABLE file OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
install_license(wonderwords ${file})
if(TARGET xgrammar)
  install_license(xgrammar ${SPOT_XGRAMMAR}/LICENSE)
  install_license(xgrammar-notice ${SPOT_XGRAMMAR}/NOTICE)
  # Its own is the comment at the header's top; dlpack's is xgrammar's.
  file(READ ${SPOT_XGRAMMAR}/3rdparty/picojson/picojson.h header)
  string(FIND "${header}" "*/" end)
  string(SUBSTRING "${header}" 0 ${end} header)
  file(WRITE ${CMAKE_BINARY_DIR}/picojson-license "${header}*/\n")
  install_license(picojson ${CMAKE_BINARY_DIR}/picojson-license)
endif()
