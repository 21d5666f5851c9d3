// What the sanitizers must catch: without an argument a read past the end, with one a signed overflow.
#include <climits>
#include <vector>

int main(int count, char**) {
    std::vector<int> values(3, INT_MAX);
    if (count > 1) return values[0] + count > 0;
    const int* data = values.data();
    return data[count + 2] == 0;
}
