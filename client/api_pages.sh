#!/bin/sh
# Makes the pages of kvd.h with doxygen. usage: api_pages.sh DOXYGEN DOXYFILE OUT-DIR   (makes man3, html and xml there)
set -e
rm -rf "$3/man3" "$3/html" "$3/xml"
"$1" "$2"
# A page for everything that begins with kvd; not for each field of a structure.
find "$3/man3" ! -name 'kvd*.3' -type f -delete
