// Owns the precompiled header that the libraries and tests share (CMakeLists.txt).
