/* Runs a harness over files, as libFuzzer does; for any C compiler. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
    for (int k = 1; k < argc; k++) {
        static uint8_t data[1 << 16];
        FILE *file = fopen(argv[k], "rb");

        if (!file) {
            perror(argv[k]);
            return 1;
        }
        size_t size = fread(data, 1, sizeof data, file);
        fclose(file);

        /* An exact copy, so that reading behind the input is seen. */
        uint8_t *copy = malloc(size);
        for (size_t i = 0; i < size; i++)
            copy[i] = data[i];
        fprintf(stderr, "%s\n", argv[k]);
        LLVMFuzzerTestOneInput(copy, size);
        free(copy);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
