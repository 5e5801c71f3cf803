// The parts in their order.
if (PLAN) headline();
if (DATA.search) search();
if (PLAN) {
  mesh();
  memory();
  timeline();
  traffic();
  parameters();
  diagnostics();
}
command();
