# Fails where cmake is older than the project needs: cmake -P cmake/version.cmake
cmake_minimum_required(VERSION 3.24)
