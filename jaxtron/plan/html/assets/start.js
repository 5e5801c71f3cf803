// The parts in their order: of a search the layouts come first, the rest is of the best that was compiled.
if (PLAN) headline();
if (DATA.search) search();
if (PLAN) {
  stepTime();
  mesh();
  memory();
  timeline();
  traffic();
  parameters();
  diagnostics();
}
command();
