// Fresh output memory.
#pragma once

#include <cstdint>

namespace genfast {

// Asks for huge pages under an output of at least 4 MiB before its first touch: a page fault for every 4 KiB is most of
// the time of a large elementwise op otherwise (64 MiB: 16-20 ms, 4.5 with huge pages).
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace genfast
