// Runs every test on every instruction set that this binary and machine can: GENFAST_CPU is not needed.
#include <chrono>

#include "check.h"
#include "isas.h"

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  std::printf("instruction sets:");
  for (genfast::Isa isa : isas()) std::printf(" %s", genfast::isa_name(isa));
  std::printf("\n");
  int run = 0;
  for (const check::Test& test : check::tests()) {
    if (std::string(test.name).find(wanted) == std::string::npos) continue;
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
