// Runs every test on every instruction set that this binary and machine can: GENFAST_CPU is not needed. Arguments: some
// letters of the names of the tests to run, or --part 2/4 for the second quarter of them.
#include <chrono>

#include "check.h"
#include "isas.h"

int main(int argc, char** argv) {
  size_t part = 1, parts = 1;
  const bool split = argc > 2 && std::string(argv[1]) == "--part";
  if (split && (std::sscanf(argv[2], "%zu/%zu", &part, &parts) != 2 || part < 1 || part > parts)) {
    std::fprintf(stderr, "--part %s: give a number and how many there are, as in 2/4\n", argv[2]);
    return 2;
  }
  const std::string wanted = argc > 1 && !split ? argv[1] : "";
  std::printf("instruction sets:");
  for (genfast::Isa isa : isas()) std::printf(" %s", genfast::isa_name(isa));
  std::printf("\n");
  int run = 0;
  size_t number = 0;
  for (const check::Test& test : check::tests()) {
    if (number++ % parts != part - 1 || std::string(test.name).find(wanted) == std::string::npos) continue;
    const int before = check::failures();
    const auto start = std::chrono::steady_clock::now();
    test.run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-4s %s (%.2f s)\n", check::failures() == before ? "ok" : "FAIL", test.name, seconds);
    ++run;
  }
  std::printf("%d tests, %d failed checks\n", run, check::failures());
  return check::failures() == 0 && run > 0 ? 0 : 1;
}
